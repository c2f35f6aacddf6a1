"""
Choosing the number of clusters
===============================

The usual way to a number of clusters is to fit a model for each and to compare them by a
criterion: BIC for a `~sklearn.mixture.GaussianMixture`, the silhouette for k-means.
`~deepmix.DeepDPM` is fitted once. It finds the number by splits and merges, see
:ref:`sphx_glr_auto_examples_plot_deep_dpm.py`.
"""

# %%
# Two sets of rows
# ----------------
# Seven Gaussians, long and of unequal size, in the plane; and the same rows with a third column, a
# yes that one row in thirty has by chance and that says nothing about the clusters.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from deepmix import DeepDPM

draw = np.random.default_rng(0)
centers = np.array([[0, 0], [0, 2], [0, 4], [9, 0], [9, 2], [9, 4], [4.5, 7]])
y = draw.choice(7, 1500, p=[0.25, 0.2, 0.15, 0.15, 0.1, 0.1, 0.05])
plane = centers[y] + draw.normal(size=(1500, 2)) * [1.6, 0.3]
sets = {"plane": plane, "with a rare yes": np.c_[plane, draw.random(1500) < 1 / 30]}
sets = {name: StandardScaler().fit_transform(X) for name, X in sets.items()}

# %%
# A search, and one fit
# ---------------------
# In the plane all agree. A column of two values is no Gaussian: a cluster that has one of them
# alone gains in likelihood without bound, and is far from all others for the silhouette. DeepDPM
# sees that a column of so few values is rounded, and gives back what rounding took of its variance.

numbers = range(2, 13)
fig, axes = plt.subplots(2, 3, figsize=(10, 5.5), layout="constrained")
for row, (name, X) in zip(axes, sets.items()):
    model = DeepDPM(amortized=False).fit(X)
    bic = [GaussianMixture(k, n_init=3, random_state=0).fit(X).bic(X) for k in numbers]
    labels = [KMeans(k, n_init=3, random_state=0).fit_predict(X) for k in numbers]
    silhouette = [silhouette_score(X, z) for z in labels]
    row[0].scatter(*plane.T, c=model.labels_, s=2, cmap="tab10")
    row[0].set(title=f"{name}: DeepDPM finds {model.n_clusters_}", xticks=[], yticks=[])
    for ax, values, best, word in (
        (row[1], bic, np.argmin(bic), "BIC, low is good"),
        (row[2], silhouette, np.argmax(silhouette), "silhouette, high is good"),
    ):
        ax.plot(numbers, values, marker="o", markersize=3)
        ax.plot(numbers[best], values[best], marker="o", color="C3")
        ax.axvline(model.n_clusters_, color="gray", linestyle=":")
        ax.set(title=f"{word}: {numbers[best]}", xlabel="number of clusters")
    print(f"{name}: ARI of DeepDPM with the truth {adjusted_rand_score(y, model.labels_):.3f}")
plt.show()

# %%
# In a pipeline
# -------------
# What is left to choose is a matter of the model, and the density of rows that were held out can
# choose it, as `~sklearn.model_selection.GridSearchCV` does by default: ``score`` is the mean
# log-density. (Not the steps before: densities of other features are no better or worse.)

pipeline = make_pipeline(StandardScaler(), DeepDPM(amortized=False))
grid = {"deepdpm__covariance_type": ["full", "diag", "spherical"]}
folds = KFold(3, shuffle=True, random_state=0)
search = GridSearchCV(pipeline, grid, cv=folds).fit(plane)
for parameters, score in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"]):
    print(parameters["deepdpm__covariance_type"], f"{score:.3f}")
print(f"chosen: {search.best_params_}, {search.best_estimator_[-1].n_clusters_} clusters")
