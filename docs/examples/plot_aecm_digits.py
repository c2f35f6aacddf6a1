"""
===========================================
Digits: codes, centres, and the way between
===========================================

:class:`~deepmix.AECM` on the 1797 digits of scikit-learn: what it finds, the codes it finds it
in, the decoded centres, and the straight lines between them, as in Figs. 5 to 7 of the paper
(:doc:`/methods/aecm`).
"""

# %%
# Four clusterings
# ----------------
#
# The network is smaller than the default and trained for few epochs: this page is to build quickly.
# Accuracy counts the rows that are right under the best matching of clusters to digits.

import time

import matplotlib.pyplot as plt
import numpy as np
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

from deepmix import AECM, ClusteringModule
from deepmix.metrics import clustering_accuracy
from deepmix.plotting import CenterDisplay, EmbeddingDisplay

X, y = load_digits(return_X_y=True)
aecm = AECM(
    10, hidden_layer_sizes=(500, 500), pretrain_max_iter=30, max_iter=50, tol=0, random_state=0
)
models = {
    "k-means": KMeans(10, n_init=10, random_state=0),
    "Gaussian mixture, full": GaussianMixture(10, reg_covar=0.1, random_state=0),
    "ClusteringModule": ClusteringModule(10, random_state=0),
    "AECM": aecm,
}
for name, model in models.items():
    start = time.perf_counter()
    labels = model.fit_predict(X)
    seconds = time.perf_counter() - start
    ari, accuracy = adjusted_rand_score(y, labels), clustering_accuracy(y, labels)
    print(f"{name:<23} ARI {ari:.2f}   accuracy {accuracy:.2f}   {seconds:5.1f} s")

# %%
# One seed of one network: other seeds give other figures, better and worse. The tables of
# :doc:`/benchmarks` have means over seeds.
#
# Codes
# -----
#
# The first two principal components of the raw pixels and of the codes, coloured by the true
# digits, which no model has seen; squares are the centres.

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
EmbeddingDisplay(X @ np.linalg.svd(X - X.mean(0), full_matrices=False)[2][:2].T, y).plot(ax=left)
EmbeddingDisplay.from_estimator(aecm, X, y, ax=right)
left.set_title("pixels")
right.set_title("codes of AECM")
plt.show()

# %%
# Ten clusters in ten dimensions overlap when seen in two; the loss pulls each one around its own
# axis.
#
# Centres
# -------
#
# The centres decoded to images, with the share of rows in each cluster. A digit that is missing
# was split over two clusters or shares one.

CenterDisplay.from_estimator(aecm, image_shape=(8, 8), n_columns=10)
plt.show()

# %%
# Between two centres
# -------------------
#
# Points on the line between two centres among the codes, decoded.

order = np.argsort([np.bincount(y[aecm.labels_ == k], minlength=10).argmax() for k in range(10)])
fig, axes = plt.subplots(5, 9, figsize=(7.5, 4.2), layout="constrained")
for row, start in zip(axes, range(0, 10, 2), strict=True):
    images = aecm.interpolate(order[start], order[start + 1], n_steps=9)
    for ax, image in zip(row, images, strict=True):
        ax.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=16)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(ax in (row[0], row[-1]))
plt.show()

# %%
# New digits
# ----------
#
# Drawn from the spherical mixture among the codes, and decoded.

images, origin = aecm.sample(20)
display = CenterDisplay(images, (8, 8), titles=[f"cluster {k}" for k in origin])
display.plot(n_columns=10)
plt.show()
