"""
==========================================
A critic of codes: before and after a game
==========================================

:class:`~deepmix.DCAN` with codes of two dimensions, so that everything can be seen: where the codes
of an autoencoder lie, where the game moves them, and what its critic thinks of the plane
(:doc:`/methods/dcan`).
"""

# %%
# Five digits in the plane
# ------------------------
#
# Two dimensions are too few for ten digits, and the accuracies below are those of five of them. The
# start is what the autoencoder and k-means find: ``max_iter=0``.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits

from deepmix import DCAN
from deepmix.metrics import clustering_accuracy
from deepmix.plotting import EmbeddingDisplay

X, y = load_digits(n_class=5, return_X_y=True)
options = {"latent_dim": 2, "pretrain_max_iter": 80, "random_state": 0}
start = DCAN(5, max_iter=0, **options).fit(X)
model = DCAN(5, **options).fit(X)
for name, fitted in (("start", start), ("game", model)):
    print(f"{name}: accuracy {clustering_accuracy(y, fitted.labels_):.3f}")

# %%
# In a plane the game changes the shape of clusters, and their accuracy little: it has nowhere to
# move a class to. In ten dimensions, on images, it gains (:doc:`/benchmarks`).
#
# Codes before and after, coloured by the true digits, which no model has seen; squares are the
# means of the mixture that the labels are read from.

fig, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
for ax, fitted, title in zip(axes, (start, model), ("autoencoder", "after the game")):
    EmbeddingDisplay.from_estimator(fitted, X, y, ax=ax)
    ax.set_title(title)

# %%
# What the critic thinks
# ----------------------
#
# The critic sees codes relative to the component that they are given to. Its logit is positive
# where it would rather believe in a draw. At the end of a game there is little left to see: where
# codes are, it is near zero, and the loss near 2 ln 2. Borders of components cut the plane, since
# residuals jump there.

module = model.module_
z = model.transform(X)
low, high = z.min(axis=0) - 0.5, z.max(axis=0) + 0.5
across, up = np.meshgrid(np.linspace(low[0], high[0], 200), np.linspace(low[1], high[1], 200))
grid = torch.tensor(np.stack([across.ravel(), up.ravel()], axis=1), dtype=torch.float32)
with torch.no_grad():
    logit = module.judge(grid).reshape(200, 200).numpy()

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
surface = left.pcolormesh(across, up, logit, cmap="RdBu", vmin=-1, vmax=1)
left.plot(*z.T, ".", color="black", markersize=1)
fig.colorbar(surface, ax=left, label="the critic's logit")
left.set_title("draw (blue) or code (red)?")

history = model.history_
right.plot(history["critic"], label="critic's loss")
right.axhline(2 * np.log(2), color="gray", linestyle=":", label="2 ln 2")
right.plot(history["critic_accuracy"], label="critic's accuracy")
right.plot(history["reconstruction"], label="reconstruction, relative")
right.set(xlabel="epoch", ylim=(0, 2))
right.legend()

# %%
# Draws
# -----
#
# The decoder turns draws from each component into images.

drawn, labels = model.sample(400)
fig, axes = plt.subplots(5, 8, figsize=(6, 4), layout="constrained")
for k, row in enumerate(axes):
    for ax, image in zip(row, drawn[labels == k]):
        ax.imshow(image.reshape(8, 8), cmap="gray_r")
        ax.axis("off")
plt.show()
