r"""Clustering Module: a spherical Gaussian mixture written as a one-layer autoencoder.

Boubekki, Kampffmeyer, Brefeld and Jenssen, "Joint optimization of an autoencoder for
clustering and embedding", Machine Learning 110 (2021). A softmax encoder gives the
responsibilities, an affine decoder holds the centres; the loss (Eq. 7) is minus the expected
complete log-likelihood of the mixture (Eq. 2), minimised by mini-batches. Implemented: Secs. 3
and 4.1, Appendix 2; the deep model of Sec. 4.2 is in `deepmix.mixture.clustering_module.aecm`.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from deepmix import parameters as p
from deepmix._torch import sum_batchwise
from deepmix.fitting import Trained
from deepmix.kmeans import check_centers, initial_centers, sample_rows
from deepmix.mixture.clustering_module.center_mixture import CenterMixture
from deepmix.mixture.clustering_module.losses import (
    DirichletPrior,
    ambiguity,
    inertia,
    inertia_and_gradients,
)
from deepmix.mixture.clustering_module.network import (
    StandardizedClusteringNetwork,
    standardized_variance,
)
from deepmix.mixture.clustering_module.online import OnlineMixin
from deepmix.training import Objective, Phase

if TYPE_CHECKING:
    from typing_extensions import Self


class PaperSettings(NamedTuple):
    """Settings for one data set: a column of Table 12."""

    concentration: float
    batch_size: int


PAPER_SETTINGS = {
    "mnist": PaperSettings(177, 111),
    "fashion_mnist": PaperSettings(80, 35),
    "usps": PaperSettings(40, 150),
    "cifar10": PaperSettings(164, 350),
    "reuters10k": PaperSettings(10, 400),
    "news20": PaperSettings(11, 85),
    "10x73k": PaperSettings(1000, 500),
    "pendigits": PaperSettings(13, 80),
}


def paper_settings(table, dataset):
    """Parameters that the paper tuned for a data set: dict."""
    if dataset not in table:
        raise ValueError(
            f"The paper lists no settings for {dataset!r}. Choose one of {sorted(table)}."
        )
    return table[dataset]._asdict()


# --- Training --------------------------------------------------------------------------


class ClusteringObjective(Objective):
    """The loss of Eq. 7 on all restarts, by its gradient in closed form.

    Parameters
    ----------
    embed : callable
        Maps a batch to the rows that are clustered: a standardiser or a frozen encoder.
    clustering : ClusteringNetwork
    prior : DirichletPrior
    """

    def __init__(self, embed, clustering, prior):
        self.prepare, self.clustering, self.prior = embed, clustering, prior

    def phases(self):
        return (Phase(tuple(self.clustering.parameters()), self.step, closed_form=True),)

    def step(self, x, index, weight):
        log_resp = self.clustering.log_resp(x)
        terms, logits, centers = inertia_and_gradients(
            x, log_resp, self.clustering.centers(), weight, self.prior
        )
        logits = logits.view(len(x), -1)
        bias = centers.sum(dim=1, keepdim=True)
        # In the order of ClusteringNetwork.parameters()
        return terms, (x.T @ logits, logits.sum(dim=0), centers, bias)


def restart_criterion(criterion, embed, clustering, rows):
    """Evaluate a criterion on all rows, for each restart.

    Parameters
    ----------
    criterion : callable
        ``(x, resp, centers, weight) -> Tensor of shape ()``, a sum over rows.
    embed, clustering
        As in `ClusteringObjective`.
    rows : Rows

    Returns
    -------
    ndarray of shape (n_restarts,)
    """
    centers = clustering.centers()

    def total(batch, weight):
        x = embed(batch)
        resp = clustering.log_resp(x).exp().unbind(dim=1)
        return torch.stack(
            [criterion(x, r, mu, weight) for r, mu in zip(resp, centers, strict=True)]
        )

    return sum_batchwise(total, rows).cpu().numpy()


# --- Estimator -------------------------------------------------------------------------


@p.parameters
class ClusteringModule(OnlineMixin, CenterMixture):
    """Clustering module: a spherical Gaussian mixture trained as a one-layer autoencoder.

    It finds what k-means and a spherical `GaussianMixture` find, by mini-batches, with a prior
    that keeps clusters from dying, and with a linear encoder that assigns new rows without
    distances. It is also the head of `AECM`. Where clusters are elongated, a full-covariance
    `sklearn.mixture.GaussianMixture` is the better tool.

    Parameters
    ----------
    n_clusters : int, default=8
        Number of clusters.
    init : {'k-means++', 'k-means', 'random'}, callable or array-like of shape \
            (n_clusters, n_features), default='k-means++'
        Where training starts. The names of scikit-learn's KMeans, 'k-means' for a whole run of
        it, and 'random' for random weights (the paper's CM^r). A callable is called as
        ``init(X, n_clusters, random_state=random_state)`` on standardised rows; an array holds
        centres in the units of X.
    encoder_init : {'posterior', 'pinv'}, default='posterior'
        How the encoder starts from centres: 'posterior' assigns each row to its nearest centre;
        'pinv' is the paper's pseudo-inverse, which does not (its CM^p).
    n_init : int, default=10
        Restarts, trained side by side as one model: ten cost about two to three times one.
    selection : {'inertia', 'sparsity'}, default='inertia'
        Which restart is kept: that of lowest soft inertia (E1 + E2 + E3), or of lowest
        L_sp = E2 + E3, the paper's criterion (Sec. 5.2.4).
    concentration : 'auto', float or array-like of shape (n_clusters,), default='auto'
        Concentration of the Dirichlet prior on the mean responsibilities of a batch (alpha). A
        float is the paper's, which depends on batch size and units; 'auto' is 1 plus 0.05 times the
        weight of the batch times the total variance. An array is paired with the clusters by size.
    max_iter : int, default=200
        Epochs, at most.
    batch_size : int or 'auto', default='auto'
        Rows in a step; 'auto' is n_samples / 40 between 20 and 256.
    learning_rate_init : float, default=0.01
        Step size.
    solver : {'adam', 'sgd'}, default='adam'
        Optimiser.
    epsilon : float, default=1e-8
        Term added to the denominator of Adam's step for numerical stability.
    max_grad_norm : float or None, default=None
        Clip the gradient, that of all restarts together, to this norm; with 'sgd' it prevents
        divergence.
    averaging : bool, default=True
        Whether an epoch more ends training, whose mean weights are kept (Sec. 4.1).
    scale : bool, default=True
        Whether to centre the data and divide them by one number before training, so that steps
        and defaults mean the same on all data; attributes are in the units of X.
    tol : float, default=1e-4
        An epoch counts as improvement if it lowers the loss by this fraction. 0 trains for
        ``max_iter`` epochs.
    n_iter_no_change : int, default=5
        Epochs without improvement that end training.
    warm_start : bool, default=False
        Whether `fit` goes on from the last solution.
    device : str or torch.device, default='auto'
        Where to compute.
    dtype : {'float32', 'float64', 'auto'}, default='float32'
        Floating-point type of training; 'auto' is that of X. Predictions have the dtype of X.
    random_state : int, RandomState instance or None, default=None
        Determines initial weights and the order of rows.
    verbose : int, default=0
        Print a line every ten epochs (1) or every epoch (10).

    Attributes
    ----------
    cluster_centers_ : ndarray of shape (n_clusters, n_features)
        Images of the unit vectors under the decoder, in the units of X.
    labels_ : ndarray of shape (n_samples,)
        Cluster of each training row.
    weights_ : ndarray of shape (n_clusters,)
        Mean responsibilities.
    variance_ : float
        Variance of the spherical Gaussians, fitted to the training data, in squared units of X.
    n_clusters_ : int
        Number of clusters.
    history_ : dict of str to ndarray of shape (`n_iter_`,)
        'loss' and its terms 'inertia' and 'balance', per row, in standardised units.
    n_iter_ : int
        Epochs run, the averaging epoch not counted.
    converged_ : bool
        Whether ``tol`` ended training.
    device_ : str
        Where it was trained.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, where X has strings for column names.

    See Also
    --------
    AECM : The same, inside a deep autoencoder.
    sklearn.cluster.KMeans : Hard assignments and Lloyd's algorithm.
    sklearn.mixture.GaussianMixture : Other shapes of clusters, by EM.

    References
    ----------
    .. [1] A. Boubekki, M. Kampffmeyer, U. Brefeld, R. Jenssen, "Joint optimization of an
       autoencoder for clustering and embedding", Machine Learning 110, 2021.

    Examples
    --------
    >>> from sklearn.datasets import make_blobs
    >>> from deepmix import ClusteringModule
    >>> X, y = make_blobs(n_samples=300, centers=3, random_state=0, cluster_std=0.5)
    >>> model = ClusteringModule(n_clusters=3, random_state=0).fit(X)
    >>> model.cluster_centers_.shape
    (3, 2)
    >>> model.predict_proba(X[:2]).shape
    (2, 3)
    """

    n_clusters: p.Count = 8
    _: KW_ONLY
    init: Literal["k-means++", "k-means", "random"] | Callable | p.ArrayLike = "k-means++"
    encoder_init: Literal["posterior", "pinv"] = "posterior"
    n_init: p.Count = 10
    selection: Literal["inertia", "sparsity"] = "inertia"
    concentration: p.Positive | p.Auto | p.ArrayLike = "auto"
    max_iter: p.CountOrZero = 200
    batch_size: p.Count | p.Auto = "auto"
    learning_rate_init: p.Positive = 1e-2
    solver: p.Solver = "adam"
    epsilon: p.Positive = 1e-8
    max_grad_norm: p.Positive | None = None
    averaging: bool = True
    scale: bool = True
    tol: p.NonNegative = 1e-4
    n_iter_no_change: p.Count = 5
    warm_start: bool = False
    device: p.Device = "auto"
    dtype: p.Dtype = "float32"
    random_state: p.RandomState = None
    verbose: p.Verbosity = 0

    _network_class = StandardizedClusteringNetwork
    _batched_restarts = True
    _transform_output = "resp"

    @classmethod
    def from_paper(
        cls, dataset: str, n_clusters: int = 10, *, init: str = "random", **parameters: Any
    ) -> "Self":
        """Make an estimator with the settings of the paper (Appendix 2 and Table 12).

        No scaling, Adam with a step of 1e-3 and an epsilon of 1e-3, 150 epochs and the averaging
        epoch, one restart.

        Parameters
        ----------
        dataset : {'mnist', 'fashion_mnist', 'usps', 'cifar10', 'reuters10k', 'news20', \
                '10x73k', 'pendigits'}
            Data set whose concentration and batch size are taken.
        n_clusters : int, default=10
        init : {'random', 'k-means++'}, default='random'
            The paper's CM^r or CM^p.
        **parameters
            Override any of these settings.

        Returns
        -------
        estimator : ClusteringModule
        """
        settings = {
            **paper_settings(PAPER_SETTINGS, dataset),
            "init": init,
            "encoder_init": "pinv",
            "n_init": 1,
            "max_iter": 150,
            "learning_rate_init": 1e-3,
            "epsilon": 1e-3,
            "scale": False,
            "tol": 0,
        }
        return cls(n_clusters, **{**settings, **parameters})

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Draw rows from the mixture of `score_samples`.

        Parameters
        ----------
        n_samples : int, default=1

        Returns
        -------
        X : ndarray of shape (n_samples, n_features)
        labels : ndarray of shape (n_samples,)
            Cluster that each row was drawn from.
        """
        check_is_fitted(self)
        labels, noise = self._draw(n_samples, self.n_features_in_)
        return self.cluster_centers_[labels] + np.sqrt(self.variance_) * noise, labels

    # --- Hooks of the base class -----------------------------------------------------

    @property
    def _n_features_out(self):
        return self.n_clusters_

    def _n_restarts(self, fit):
        fixed = not isinstance(self.init, str) and not callable(self.init)
        return 1 if fixed else super()._n_restarts(fit)

    def _network_arguments(self, n_features):
        return {"n_features": n_features, "n_clusters": self.n_clusters}

    def _init_network(self, fit, n_restarts):
        rows = fit.rows
        network = StandardizedClusteringNetwork(rows.n_features, self.n_clusters, n_restarts)
        network = network.to(fit.dtype)
        if self.scale:
            network.scaler.fit(*rows.moments())
        if isinstance(self.init, str) and self.init == "random":
            network.clustering.init_random(fit.rng.torch)  # drawn on the CPU for every device
            return network
        network = network.to(fit.device)
        centers = self._initial_centers(fit, network, n_restarts)
        if self.encoder_init == "pinv":
            network.clustering.init_pseudo_inverse(centers)
        else:
            temperature = 2 / (standardized_variance(network, rows) or 1.0)
            network.clustering.init_centers(centers, temperature)
        return network

    def _initial_centers(self, fit, network, n_restarts):
        """Centres in standardised units: Tensor of shape (n_restarts, K, d)."""
        rows, random_state = fit.rows, fit.rng.numpy
        if not isinstance(self.init, str) and not callable(self.init):
            centers = check_centers(self.init, self.n_clusters, rows.n_features)
            return network.scaler(torch.tensor(centers).to(network.scaler.mean))[None]
        X, weight = sample_rows(rows, network.scaler, self.n_clusters, random_state)
        starts = [
            initial_centers(self.init, X, self.n_clusters, random_state, weight)
            for _ in range(n_restarts)
        ]
        return torch.tensor(np.stack(starts), dtype=rows.dtype)

    def _objective(self, fit, network):
        variance = standardized_variance(network, fit.rows)
        prior = DirichletPrior(self.concentration, variance, network.scaler.scale)
        return ClusteringObjective(network.scaler, network.clustering, prior)

    def _train(self, fit, network):
        history = self._minimize_and_average(fit, network, self._objective(fit, network))
        criterion = {"inertia": inertia, "sparsity": ambiguity}[self.selection]
        values = restart_criterion(criterion, network.scaler, network.clustering, fit.rows)
        return Trained(network.eval(), history, values)
