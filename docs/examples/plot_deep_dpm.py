"""
Splits and merges
=================

How `~deepmix.DeepDPM` comes to the number of clusters. Beside a search over numbers of clusters:
:ref:`sphx_glr_auto_examples_plot_choosing_k.py`.
"""

# %%
# From one cluster and from many
# ------------------------------
# Seven Gaussians in the plane. Training is stopped after more and more epochs; above it begins with
# one cluster, below with twenty. Splits and merges lead both to the same partition.

import warnings

import matplotlib.pyplot as plt
import numpy as np
from sklearn.exceptions import ConvergenceWarning

from deepmix import DeepDPM

draw = np.random.default_rng(1)
centers = 5 * np.array([[0, 0], [1, 0.2], [2, 0], [0.3, 1], [1.4, 1.1], [2.3, 1.2], [1, 2]])
y = draw.integers(0, 7, 1400)
shapes = draw.normal(size=(7, 2, 2)) * 0.5
X = centers[y] + np.einsum("nij,nj->ni", shapes[y], draw.normal(size=(1400, 2)))


def stopped_after(n_epochs, n_clusters_init):
    model = DeepDPM(n_clusters_init, amortized=False, max_iter=n_epochs, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(X)


fig, axes = plt.subplots(2, 5, figsize=(10, 4.4), layout="constrained")
for row, (start, epochs) in zip(axes, ((1, (1, 12, 18, 20, 200)), (20, (0, 24, 33, 39, 200)))):
    for ax, n_epochs in zip(row, epochs):
        model = stopped_after(n_epochs, start)
        ax.scatter(*X.T, c=model.labels_, s=2, cmap="tab20", vmin=0, vmax=19)
        ax.set(title=f"{model.n_iter_} epochs: {model.n_clusters_}", xticks=[], yticks=[])

# %%
# Every proposal is kept with its Hastings ratio. Those that were accepted, from twenty clusters:

accepted = model.proposals_[model.proposals_["accepted"]]
for proposal in accepted[-6:]:
    print(f"epoch {proposal['epoch']}: {proposal['kind']}, log ratio {proposal['log_ratio']:.1f}")
