r"""DeepDPM with features that are learnt: an autoencoder and a mixture, in alternation.

Ronen, Finder and Freifeld, "DeepDPM: Deep clustering with an unknown number of clusters", CVPR
2022, in its form with joint feature learning. An autoencoder is trained alone. Then its codes are
clustered by DeepDPM, and it is trained on with the codes drawn to the centres that were found, in
turn. The last step is a clustering, so that encoder, mixture and labels belong together.
"""

import math
from dataclasses import KW_ONLY, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from deepmix._torch import Rows, apply_batchwise, full_precision
from deepmix.base import BaseDeepMixture
from deepmix.center_mixture import DecoderMixin
from deepmix.distributions import log_evidence
from deepmix.initialization import (
    ReconstructionObjective,
    build_autoencoder,
    reconstruction_unit,
)
from deepmix.linalg import inverse_cholesky
from deepmix.losses import squared_error
from deepmix.mixture.deep_dpm import DeepDPM, finds_its_number, mixture_attributes
from deepmix.mixture.dirichlet_process_mixture import DPMNetwork, in_pieces
from deepmix.networks import (
    Autoencoder,
    Standardizer,
    check_layer_sizes,
    make_coder,
    trainable,
    widest,
)
from deepmix.parameters import (
    ArrayLike,
    Auto,
    Coder,
    Count,
    CountOrZero,
    Device,
    Dtype,
    Layers,
    Matrix,
    NonNegative,
    Positive,
    Precision,
    RandomState,
    Verbosity,
    parameters,
)
from deepmix.scaled_rows import ScaledRows
from deepmix.split_merge import PROPOSAL
from deepmix.training import History, Objective, Phase

if TYPE_CHECKING:
    from typing_extensions import Self

# Codes of an autoencoder fill space more evenly than an embedding made for clusters does: this
# prior scale for each row lets no cluster of a tenth of the rows be thinner than a fifth of the
# deviation of the codes.
CODE_FLOOR = 3.5e-3
# A smaller share of the data's variance than this is no error that reconstruction must go below.
LEAST_ERROR = 0.02
# Clusters thinner than this share of the variance of the codes count as points.
LEAST_SHRINKAGE = 1e-3
# Codes of more features than this have so many dimensions unless told otherwise.
LATENT_DIM = 10

# --- Losses ----------------------------------------------------------------------------


def center_distance(z, centers, labels, weight):
    r"""Squared distance of codes from the centres of their clusters.

    .. math:: \sum_i w_i \lVert z_i - \mu_{k_i} \rVert^2

    Parameters
    ----------
    z : Tensor of shape (B, p)
    centers : Tensor of shape (K, p)
    labels : Tensor of shape (B,)
    weight : Tensor of shape (B,)

    Returns
    -------
    Tensor of shape ()
    """
    return weight @ (z - centers[labels]).square().sum(dim=1)


def within_share(statistics):
    r"""Share of the clusters' scatter in that of all rows, a sum over features.

    .. math:: \frac{\sum_k \sum_{i \in k} \lVert x_i - \bar x_k \rVert^2}
        {\sum_i \lVert x_i - \bar x \rVert^2}

    Parameters
    ----------
    statistics : GaussianStatistics
        Of diagonal covariances.

    Returns
    -------
    float
        1 where all rows are equal.
    """
    nk, first, second = statistics.nk[:, None], statistics.first, statistics.second
    within = (second - first.square() / nk.clamp_min(1e-300)).sum()
    total = (second.sum(dim=0) - first.sum(dim=0).square() / nk.sum()).sum()
    return float(within / total) if total > 0 else 1.0


# --- Network ---------------------------------------------------------------------------


class AutoencoderDPMNetwork(nn.Module):
    """An autoencoder, and a mixture of its codes.

    Attributes
    ----------
    scaler : Standardizer
        Of the data.
    autoencoder : Autoencoder
    clustering : DPMNetwork
        Of the codes, with a scaling of its own.
    error : Tensor of shape ()
        Squared error of a row after pretraining: the unit of the reconstruction.
    shrinkage : Tensor of shape ()
        What the alternations have left of the clusters' share in the variance of the codes.
    """

    def __init__(
        self,
        n_features,
        n_clusters,
        latent_dim,
        hidden_layer_sizes,
        encoder=None,
        decoder=None,
        clustering_hidden_layer_sizes=None,
        full=True,
    ):
        super().__init__()
        sizes = (n_features, *hidden_layer_sizes, latent_dim)
        self.scaler = Standardizer(n_features)
        self.autoencoder = Autoencoder(
            make_coder(encoder, sizes, "encoder"), make_coder(decoder, sizes[::-1], "decoder")
        )
        self.clustering = DPMNetwork(latent_dim, n_clusters, clustering_hidden_layer_sizes, full)
        self.register_buffer("error", torch.ones(()))
        self.register_buffer("shrinkage", torch.ones(()))

    @property
    def width(self):
        """Numbers that a row becomes at most."""
        return max(len(self.scaler.mean), widest(self.autoencoder), self.clustering.width)

    @property
    def mixture(self):
        return self.clustering.mixture

    def encode(self, x):
        """Codes: (B, n_features) -> (B, latent_dim)."""
        return self.autoencoder.encoder(self.scaler(x))

    def decode(self, z):
        """Back to the units of the data: (B, latent_dim) -> (B, n_features)."""
        return self.scaler.inverse(self.autoencoder.decoder(z))

    def resp(self, x):
        """Responsibilities: (B, n_features) -> (B, n_clusters)."""
        return self.clustering.resp(self.encode(x))

    def log_density(self, x):
        """Of the codes."""
        return self.clustering.log_density(self.encode(x))

    def forward(self, x):
        return self.resp(x)

    def select(self, restart):
        return self


# --- Training --------------------------------------------------------------------------


class FeatureObjective(Objective):
    """Reconstruction, and codes near the centres of their clusters; the mixture stays.

    Parameters
    ----------
    network : AutoencoderDPMNetwork
    matrix : Tensor of shape (p, p)
        Applied to codes and centres before their distance is taken.
    reconstruction_weight, clustering_weight : float
    """

    def __init__(self, network, matrix, reconstruction_weight, clustering_weight):
        clustering = network.clustering
        self.network, self.clustering, self.matrix = network, clustering, matrix
        self.centers = clustering.scaler.inverse(clustering.mixture.means) @ matrix
        self.reconstruction_weight = reconstruction_weight
        self.clustering_weight = clustering_weight

    def phases(self):
        return (Phase(trainable(self.network.autoencoder), self.step),)

    def step(self, batch, index, weight):
        x = self.network.scaler(batch)
        code, x_hat = self.network.autoencoder(x, return_code=True)
        with full_precision(x.device):  # autocast, where it is on, concerns the autoencoder only
            code, x_hat = code.to(x), x_hat.to(x)
            with torch.no_grad():
                scaled = self.clustering.scaler(code)
                mixture = self.clustering.mixture
                labels = in_pieces(mixture.log_joint, mixture.means, scaled).argmax(dim=1)
            distance = center_distance(code @ self.matrix, self.centers, labels, weight)
            return {
                "reconstruction": self.reconstruction_weight * squared_error(x, x_hat, weight),
                "clustering": self.clustering_weight * distance,
            }


class WholeReports:
    """Reports of stages that train a part of a network, and show callbacks the whole.

    Parameters
    ----------
    reports : Reports
    reconstruct : callable
        Gives the fitted attributes of the whole.
    """

    def __init__(self, reports, reconstruct):
        self.reports, self.reconstruct = reports, reconstruct
        self.interruption = reports.interruption

    def task(self, name, max_iter, reconstruct):
        return self.reports.task(name, max_iter, self.reconstruct)


# --- Estimator -------------------------------------------------------------------------


@finds_its_number
@parameters
class AutoencoderDeepDPM(DecoderMixin, DeepDPM):
    """DeepDPM on the codes of an autoencoder, which is trained in turn with it.

    For images and other data of many features, in which no Gaussian describes a cluster, and
    whose number of clusters is not known. Pretraining; then, ``n_alternations`` times, a clustering
    of the codes and ``max_iter`` epochs of the autoencoder, whose codes are drawn to the centres;
    then the last clustering. `transform` gives the codes; the mixture, and `score_samples` with it,
    is one of codes.

    Parameters
    ----------
    n_clusters_init : int, default=1
        Number of clusters that the first clustering begins with, by k-means. The others begin
        with the clusters of the one before.
    hidden_layer_sizes : tuple of int, default=(256, 128)
        Layers of the encoder between data and codes; the decoder has them in reverse.
    latent_dim : int or None, default=None
        Dimension of the codes; None takes 10, or the number of features if that is smaller.
    encoder, decoder : callable, torch.nn.Module or None, default=None
        Networks to use instead of ``hidden_layer_sizes``: a callable ``(n_in, n_out) ->
        nn.Module``, or a module, which is copied with its weights and never trained in place.
        Codes should be linear outputs.
    pretrain_max_iter : int, default=30
        Epochs of the autoencoder alone.
    n_alternations : int, default=3
        How often the autoencoder is trained between two clusterings. 0 clusters the codes of
        pretraining.
    max_iter : int, default=10
        Epochs of the autoencoder in each alternation.
    reconstruction_weight : float, default=1.0
        Of the squared error (lambda), by default relative to its value after pretraining.
    clustering_weight : float, default=1.0
        Of the squared distances of codes from the centres of their clusters (beta), by default in
        units of the variance within clusters.
    relative_loss : bool, default=True
        Whether both terms are counted in those units, which are found anew before each
        alternation, and the prior shrinks with the clusters; or in units of data and codes, as in
        the paper.
    max_clusters : int or None, default=None
        No split goes beyond this number.
    amortized : bool, default=False
        Whether a clustering net learns the responsibilities, as in the paper, or EM computes them,
        which is faster.
    covariance_type : {'full', 'diag', 'spherical'}, default='full'
        Of the clusters, in the scaled codes.
    concentration : float, default=10.0
        Of the Dirichlet process (alpha). Of little influence.
    prior_scale : 'auto', float or array-like, default='auto'
        Scale matrix of the inverse Wishart prior (Psi), in the scaled codes, as in `DeepDPM`.
        'auto' is 0.0035 times the number of rows, far more than there. It decides how many
        clusters there are: the larger, the fewer.
    prior_dof : float or None, default=None
        Its degrees of freedom (nu); None is latent_dim + 2.
    prior_kappa : float, default=0.05
        Rows that the prior on the means counts for (kappa).
    scaling : {'standard'} or None, default='standard'
        Whether the mixture sees codes that are standardised, each dimension by itself.
    check_unions : bool, default=True
        Whether two clusters are also merged where no cut would part their union, as in `DeepDPM`.
    stochastic : bool, default=False
        Whether a proposal of Hastings ratio H < 1 is accepted with probability H.
    clustering_hidden_layer_sizes : tuple of int, default=(50,)
        Of the clustering net; the subclustering nets have its first one.
    clustering_max_iter : int, default=2000
        Epochs of each clustering, at most.
    clustering_learning_rate, subcluster_learning_rate : float, default=2e-3, 5e-3
        Step sizes of the clustering net and of the subclustering nets.
    split_merge_every : int, default=300
        Gradient steps of the nets between two rounds of proposals, at least.
    freeze : int, default=100
        Gradient steps after an accepted proposal before the mixture is estimated again.
    n_init : int, default=1
        Restarts, one after another: kept is the one whose clusters gain most, in the posterior of
        the codes, over one cluster of all rows.
    batch_size : int or 'auto', default='auto'
        Rows in a step; 'auto' is n_samples / 40 between 20 and 256.
    learning_rate_init : float, default=1e-3
        Step size of the autoencoder.
    weight_decay : float, default=0.0
        Factor of the squared norm of the autoencoder's weights, halved, in the loss of a batch.
    scale : bool, default=True
        Whether the network sees centred data, divided by one number.
    precision : {'float32', 'bfloat16'}, default='float32'
        Of the autoencoder's matrix products in training.
    tol : float, default=1e-3
        In a clustering, proposals are made when no larger share of the rows has changed cluster.
        0 runs each clustering for ``clustering_max_iter`` epochs.
    warm_start : bool, default=False
        Whether `fit` goes on from the last solution, without pretraining.
    device : str or torch.device, default='auto'
        Where to compute.
    dtype : {'float32', 'float64', 'auto'}, default='float32'
        Of the nets in training; 'auto' is that of X.
    random_state : int, RandomState instance or None, default=None
        Determines initial weights and centres and the order of rows.
    verbose : int, default=0
        Print a line every ten epochs (1) or every epoch (10).

    Attributes
    ----------
    n_clusters_ : int
        Number of clusters found.
    labels_ : ndarray of shape (n_samples,)
        Cluster of each training row.
    weights_ : ndarray of shape (n_clusters,)
        Of the mixture.
    means_ : ndarray of shape (n_clusters, latent_dim)
        Of the mixture, among the codes.
    covariances_ : ndarray of shape (n_clusters, latent_dim, latent_dim) or \
            (n_clusters, latent_dim)
        Of the mixture: full, or else diagonals.
    cluster_centers_ : ndarray of shape (n_clusters, n_features)
        Decoded means, in the units of X.
    proposals_ : ndarray
        Every proposal, as in `DeepDPM`, with the number of the 'clustering' as first field.
    history_ : dict of str to ndarray
        'loss' and its terms 'reconstruction' and 'clustering', per row, of shape (`n_iter_`,);
        'n_clusters' after each clustering; 'pretrain_reconstruction', of its own length.
    n_iter_ : int
        Epochs of the autoencoder after pretraining.
    converged_ : bool
        Whether no proposal was left in the last clustering; False if ``tol=0``.
    device_ : str
        Where it was trained.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, where X has strings for column names.

    See Also
    --------
    DeepDPM : The same on features that are given.
    AECM : An autoencoder for a number of clusters that is given.

    References
    ----------
    .. [1] M. Ronen, S. E. Finder, O. Freifeld, "DeepDPM: Deep clustering with an unknown number
       of clusters", CVPR 2022.

    Examples
    --------
    >>> from sklearn.datasets import make_blobs
    >>> from deepmix import AutoencoderDeepDPM
    >>> X, y = make_blobs(n_samples=600, n_features=20, centers=5, random_state=1)
    >>> model = AutoencoderDeepDPM(hidden_layer_sizes=(32,), latent_dim=3, random_state=0).fit(X)
    >>> model.n_clusters_
    5
    >>> model.transform(X).shape
    (600, 3)
    """

    n_clusters_init: Count = 1
    _: KW_ONLY
    hidden_layer_sizes: Layers = (256, 128)
    latent_dim: Count | None = None
    encoder: Coder | None = None
    decoder: Coder | None = None
    pretrain_max_iter: CountOrZero = 30
    n_alternations: CountOrZero = 3
    max_iter: CountOrZero = 10
    reconstruction_weight: NonNegative = 1.0
    clustering_weight: NonNegative = 1.0
    relative_loss: bool = True
    max_clusters: Count | None = None
    amortized: bool = False
    covariance_type: Literal["full", "diag", "spherical"] = "full"
    concentration: Positive = 10.0
    prior_scale: Positive | Auto | ArrayLike = "auto"
    prior_dof: Positive | None = None
    prior_kappa: Positive = 0.05
    scaling: Literal["standard"] | None = "standard"
    check_unions: bool = True
    stochastic: bool = False
    clustering_hidden_layer_sizes: Layers = (50,)
    clustering_max_iter: CountOrZero = 2000
    clustering_learning_rate: Positive = 2e-3
    subcluster_learning_rate: Positive = 5e-3
    split_merge_every: Count = 300
    freeze: CountOrZero = 100
    n_init: Count = 1
    batch_size: Count | Auto = "auto"
    learning_rate_init: Positive = 1e-3
    weight_decay: NonNegative = 0.0
    scale: bool = True
    precision: Precision = "float32"
    tol: NonNegative = 1e-3
    warm_start: bool = False
    device: Device = "auto"
    dtype: Dtype = "float32"
    random_state: RandomState = None
    verbose: Verbosity = 0

    _network_class = AutoencoderDPMNetwork  # type: ignore[assignment]
    _transform_output = "encode"
    _hint_of_number = (
        "Where more are expected: try another latent_dim, more epochs of pretraining "
        "(pretrain_max_iter), or a smaller prior_scale."
    )
    _layers_parameter = "clustering_hidden_layer_sizes"
    _centers_attribute = "means_"

    @classmethod
    def from_paper(cls, n_samples: int, **parameters: Any) -> "Self":
        """Make an estimator with the schedule of the authors' program for alternations.

        An encoder of 500-500-2000 and codes of 10 dimensions; both terms of the loss in units of
        data and codes, with lambda .005 and beta 1; a step of 2e-3 with a decay of 5e-4. Three
        clusterings of 300 epochs from three clusters, by nets, with a prior scale of .005 on codes
        as they are, and 100 epochs of the autoencoder between two of them. The epochs of
        pretraining, 100 here, are not told.

        Parameters
        ----------
        n_samples : int
            Rows that it will be fitted to: they make epochs into steps.
        **parameters
            Override any of these settings.

        Returns
        -------
        estimator : AutoencoderDeepDPM
        """
        steps = max(1, -(-n_samples // 128))
        settings = {
            "n_clusters_init": 3,
            "hidden_layer_sizes": (500, 500, 2000),
            "latent_dim": 10,
            "pretrain_max_iter": 100,
            "n_alternations": 2,
            "max_iter": 100,
            "reconstruction_weight": 0.005,
            "clustering_weight": 1.0,
            "relative_loss": False,
            "amortized": True,
            "prior_scale": 0.005,
            "prior_kappa": 1e-4,
            "scaling": None,
            "check_unions": False,
            "stochastic": True,
            "clustering_max_iter": 300,
            "clustering_learning_rate": 5e-4,
            "split_merge_every": 30 * steps,
            "freeze": 2 * steps,
            "batch_size": 128,
            "learning_rate_init": 2e-3,
            "weight_decay": 5e-4,
            "scale": False,
            "tol": 1.0,
        }
        return cls(**{**settings, **parameters})

    def score_samples(self, X: Matrix) -> np.ndarray:
        """Log-density of each row's code under the mixture.

        A density of codes, not of data: it compares rows and mixtures of one encoder. Another
        encoder has other codes, in other units.

        Parameters
        ----------
        X : {array-like, sparse matrix, torch.Tensor} of shape (n_samples, n_features)

        Returns
        -------
        log_density : ndarray of shape (n_samples,)
            In nats, for codes in the units of `transform`.
        """
        return super().score_samples(X)

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Draw codes from the mixture, and decode them.

        Parameters
        ----------
        n_samples : int, default=1

        Returns
        -------
        X : ndarray of shape (n_samples, n_features)
        labels : ndarray of shape (n_samples,)
            Cluster that each row was drawn from.
        """
        codes, labels = super().sample(n_samples)
        return self.inverse_transform(codes), labels

    # --- Hooks of the base class -----------------------------------------------------

    @property
    def _n_features_out(self):
        return self._arguments["latent_dim"]

    def _n_restarts(self, rows):
        return BaseDeepMixture._n_restarts(self, rows)  # an encoder is always random

    def _mixture_work(self, rows, n_features):
        return super()._mixture_work(rows, self._network_arguments(n_features)["latent_dim"])

    def _training_dtype(self, X):
        return BaseDeepMixture._training_dtype(self, X)

    def _check_parameters(self):
        super()._check_parameters()
        check_layer_sizes(self.hidden_layer_sizes)

    def _network_arguments(self, n_features):
        latent_dim = self.latent_dim or min(LATENT_DIM, n_features)
        mixture = self._mixture_arguments(latent_dim)
        return {
            "n_features": n_features,
            "n_clusters": mixture["n_clusters"],
            "latent_dim": latent_dim,
            "hidden_layer_sizes": tuple(self.hidden_layer_sizes),
            "encoder": self.encoder,
            "decoder": self.decoder,
            "clustering_hidden_layer_sizes": mixture["hidden_layer_sizes"],
            "full": mixture["full"],
        }

    def _init_network(self, rows, n_restarts, random_state, generator):
        arguments = self._network_arguments(rows.n_features)
        self._check_memory(arguments["latent_dim"], rows.device)
        network = AutoencoderDPMNetwork(**arguments)
        parts = ("hidden_layer_sizes", "latent_dim", "encoder", "decoder")
        network.autoencoder = build_autoencoder(
            rows.n_features,
            generator=generator,
            dtype=rows.dtype,
            **{name: arguments[name] for name in parts},
        )
        network.clustering = self._draw_mixture(arguments["latent_dim"], generator)
        # Equal clusters, for callbacks that predict while the autoencoder is trained alone.
        ones = torch.ones_like(network.mixture.means, dtype=torch.float64)
        covariances = torch.diag_embed(ones) if self.covariance_type == "full" else ones
        network.mixture.set(ones[:, 0] / len(ones), 0 * ones, covariances)
        network = network.to(rows.dtype)
        if self.scale:
            network.scaler.fit(*rows.moments())
        return network

    def _train(self, network, rows, generator, random_state, reports):
        # Raises before pretraining what the first clustering would.
        self._prior_spread(rows.total_weight, network.mixture.means.shape[1])
        told = {"network": network, "rows": rows, "generator": generator}
        before = self._pretrain(reports=reports, **told)
        whole = WholeReports(reports, partial(self._attributes_midway, network, rows))
        history, clusterings, stopped = History(interrupted=before.interrupted), [], before.stopped
        n_phases = self.n_alternations if trainable(network.autoencoder) and self.max_iter else 0
        for number in range(n_phases + 1):
            if number and not history.interrupted:
                history = self._train_features(history, reports=reports, **told)
            if history.interrupted:
                break
            found = self._cluster_codes(
                random_state=random_state, reports=whole, again=number > 0, **told
            )
            clusterings.append(network.clustering)
            stopped = stopped or history.stopped or found.stopped
            history.interrupted = found.interrupted
        history.stopped = stopped or history.stopped
        settled = len(clusterings) == n_phases + 1 and found.converged
        history.converged = settled and not history.stopped
        history.before = {f"pretrain_{name}": values for name, values in before.terms.items()}
        record(network, clusterings)
        return history

    def _minimize(self, *args, task="fit", **options):
        if task != "clustering":  # of the autoencoder
            options |= {"precision": self.precision, "weight_decay": self.weight_decay}
        return super()._minimize(*args, task=task, **{"may_stop": False, **options})

    def _pretrain(self, network, rows, **told):
        """Train the autoencoder alone, and note its error."""
        history = History()
        if self._continues():
            return history
        if trainable(network.autoencoder):
            objective = ReconstructionObjective(network.autoencoder, network.scaler)
            options = {"max_iter": self.pretrain_max_iter, "task": "pretrain"}
            history = self._minimize(objective, network, rows, **options, **told)
        network.error.fill_(reconstruction_unit(network.eval(), rows, LEAST_ERROR))
        return history

    def _train_features(self, before, network, rows, **told):
        """An alternation's epochs of the autoencoder, with the optimiser of the last."""
        network.train()
        objective = self._objective_of_features(network)
        optimizers = before.optimizers or None
        history = self._minimize(
            objective, network, rows, max_iter=self.max_iter, optimizers=optimizers, **told
        )
        history.prepend(before)
        return history

    def _objective_of_features(self, network):
        clustering = network.clustering
        like, width = clustering.mixture.means, clustering.mixture.means.shape[1]
        if not self.relative_loss:
            weights = self.reconstruction_weight, 0.5 * self.clustering_weight
            return FeatureObjective(network, torch.eye(width).to(like), *weights)
        weights, _, covariances = clustering.mixture.exact
        within = torch.einsum("k,k...->...", weights, covariances)
        if covariances.dim() < 3:
            within = torch.diag(within.expand(width))
        whiten = inverse_cholesky(within)
        matrix = (whiten / clustering.scaler.scale.double()[:, None]).to(like)
        # At the start of the first alternation both terms are their weights, more or less.
        weights = self.reconstruction_weight / float(network.error), self.clustering_weight / width
        return FeatureObjective(network, matrix, *weights)

    def _cluster_codes(self, network, rows, generator, random_state, reports, again):
        """One whole clustering of the codes as they are now."""
        network.eval()
        codes = self._codes(network, rows)
        before, clustering = network.clustering, network.clustering
        clustering.given = None
        if again:
            labels = labels_of(before, ScaledRows(codes, before.scaler))
            clustering = self._draw_mixture(codes.n_features, generator)
            clustering = clustering.to(rows.device, rows.dtype)
            clustering.given = labels.unique(return_inverse=True)[1]
            network.clustering = clustering
        if again or not self._continues():
            self._fit_scaler(clustering, codes)
        data = ScaledRows(codes, clustering.scaler)
        if again and self.relative_loss:
            left = share_of(data, clustering.given) / before.within
            network.shrinkage.mul_(left).clamp_(min=LEAST_SHRINKAGE)
        codes.prior_factor = float(network.shrinkage)
        found = self._cluster(
            clustering.train(),
            data,
            generator,
            random_state,
            reports,
            max_iter=self.clustering_max_iter,
            task="clustering",
            learning_rate=self.clustering_learning_rate,
        )
        clustering.within = max(share_of(data, labels_of(clustering, data)), LEAST_SHRINKAGE)
        clustering.log_posterior -= self._log_posterior_of_one(data)
        return found

    def _codes(self, network, rows):
        codes = apply_batchwise(network.encode, rows)
        weight = None if rows.uniform else rows.weight.cpu().double().numpy()
        return Rows(codes, rows.device, rows.dtype, weight)

    def _log_posterior_of_one(self, data):
        """Of the partition of one cluster: restarts, whose codes differ, are compared above it."""
        one = torch.zeros(len(data), dtype=torch.long, device=data.weight.device)
        statistics = data.statistics(one, 1, self.covariance_type)
        return float(log_evidence(self._prior(data), statistics)) + math.log(self.concentration)

    # --- Hooks of the clustering -----------------------------------------------------

    def _continues(self):
        # A fit that was interrupted in pretraining has no clusters to go on from.
        return super()._continues() and self._clustered

    def _resumes(self, network):
        return self._continues() and network.given is None

    def _initial_labels(self, data, network, rows, random_state):
        if network.given is None:
            return super()._initial_labels(data, network, rows, random_state)
        return network.given

    def _prior(self, data):
        prior = super()._prior(data)
        return replace(prior, scale=prior.scale * data.rows.prior_factor)

    def _auto_scale(self, total_weight, n_features):
        return CODE_FLOOR * total_weight

    # --- Fitted state ----------------------------------------------------------------

    def _attributes(self, network, history, restart, rows, X):
        fitted = super()._attributes(network, history, restart, rows, X)
        return {**fitted, "_clustered": len(network.n_clusters) > 0}

    def _fitted_attributes(self, network, rows, restart=0):
        attributes = BaseDeepMixture._fitted_attributes(self, network, rows, restart)
        attributes |= mixture_attributes(network.clustering)
        means = torch.tensor(attributes["means_"]).to(rows.device, rows.dtype)
        with torch.inference_mode():
            centers = network.decode(means)
        return {**attributes, "cluster_centers_": centers.double().cpu().numpy()}

    def _concerns(self, history, rows):
        ended = self.converged_ or history.interrupted or history.stopped
        if not ended and self.tol > 0:
            yield (
                "The last clustering of AutoencoderDeepDPM did not settle in clustering_max_iter="
                f"{self.clustering_max_iter} epochs: splits or merges may be left. Increase "
                "clustering_max_iter, or set tol=0 for so many epochs and nothing else."
            )
        if not history.interrupted:
            yield from self._concerns_of_number(rows)


def labels_of(clustering, data):
    """Clusters of the rows that count: Tensor of shape (n,)."""
    with torch.no_grad():
        return data.map(lambda x, part: clustering.labels(x.to(data.rows.dtype)))


def share_of(data, labels):
    """`within_share` of the clusters that ``labels`` names: float."""
    return within_share(data.statistics(labels, int(labels.max()) + 1, "diag"))


def record(network, clusterings):
    """Leave with the network what its clusterings leave."""
    network.n_clusters = np.array([len(c.mixture.means) for c in clusterings], dtype=int)
    network.proposals = np.array(
        [(i, *row) for i, c in enumerate(clusterings) for row in c.proposals.tolist()],
        dtype=[("clustering", int), *PROPOSAL.descr],
    )
    last = clusterings[-1] if clusterings else None
    network.subnets_state = last and last.subnets_state
    network.log_posterior = last.log_posterior if last is not None else 0.0
