r"""DeepDPM with features that are learnt: an autoencoder and a mixture, in alternation.

Ronen, Finder and Freifeld, "DeepDPM: Deep clustering with an unknown number of clusters", CVPR
2022, in its form with joint feature learning. An autoencoder is trained alone. Then its codes are
clustered by DeepDPM, and it is trained on with the codes drawn to the centres that were found, in
turn. The last step is a clustering, so that encoder, mixture and labels belong together.
"""

import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted

from deepmix import parameters as p
from deepmix._torch import Rows, apply_batchwise, full_precision, own_modes
from deepmix.autoencoder import AutoencoderMixture, decoded, reconstruction_unit
from deepmix.fitting import Trained
from deepmix.gaussian_mixture import Mixture, draw_rows, full_covariances
from deepmix.gaussians import log_evidence
from deepmix.linalg import inverse_cholesky
from deepmix.losses import squared_error
from deepmix.mixture.deep_dpm.deep_dpm import (
    DeepDPM,
    finds_its_number,
    fitted_mixture,
    mixture_attributes,
    mixture_to_scaled,
    refuse_large_matrices,
    refuse_other_mixture,
    warn_of_light_weights,
)
from deepmix.mixture.deep_dpm.losses import center_distance, within_share
from deepmix.mixture.deep_dpm.network import AutoencoderDPMNetwork, DPMNetwork, in_pieces
from deepmix.mixture.deep_dpm.scaled_rows import ScaledRows
from deepmix.mixture.deep_dpm.split_merge import PROPOSAL
from deepmix.mixture.deep_dpm.training import DPMFit, Start
from deepmix.networks import trainable
from deepmix.training import History, Objective, Phase

if TYPE_CHECKING:
    from typing_extensions import Self

# Lower limit of the unit of reconstruction errors, as a share of the variance of the data.
LEAST_ERROR = 0.02
# Lower limit of the clusters' share in the variance of the codes, and of the factor by which its
# decrease scales the prior: thinner clusters count as points.
LEAST_SHRINKAGE = 1e-3
# Default dimension of the codes, if there are no fewer features.
LATENT_DIM = 10


# --- Training --------------------------------------------------------------------------


class FeatureObjective(Objective):
    """Reconstruction, and codes near the centres of their clusters; the mixture stays.

    Parameters
    ----------
    network : AutoencoderDPMNetwork
    matrix : Tensor of shape (p, p)
        Matrix that multiplies codes and centres before their distance is taken.
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


# --- Estimator -------------------------------------------------------------------------


@finds_its_number
@p.parameters
class AutoencoderDeepDPM(AutoencoderMixture):
    """DeepDPM on the codes of an autoencoder, which is trained in turn with it.

    For images and other data of many features, in which no Gaussian describes a cluster, and
    whose number of clusters is not known. Pretraining; then, ``n_alternations`` times, a clustering
    of the codes and ``max_iter`` epochs of the autoencoder, whose codes are drawn to the centres;
    then the last clustering. `transform` gives the codes; the mixture, and `score_samples` with it,
    is one of codes.

    Parameters
    ----------
    clusterer : DeepDPM or None, default=None
        What clusters the codes; None is ``DeepDPM(amortized=False, prior_scale='codes')``. It is
        copied. ``clusterer__prior_scale`` decides how many clusters there are: the larger, the
        fewer. Only the first clustering begins with its ``n_clusters_init``, the others with the
        clusters of the one before. Its ``n_init``, ``warm_start``, ``device``, ``dtype``,
        ``random_state`` and ``verbose`` are not used: this estimator's are.
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
        Factor of the squared error (lambda), by default relative to its value after pretraining.
    clustering_weight : float, default=1.0
        Factor of the squared distances of codes from the centres of their clusters (beta), by
        default in units of the variance within clusters.
    relative_loss : bool, default=True
        Whether both terms are counted in those units, which are found anew before each
        alternation, and the prior shrinks with the clusters; or in units of data and codes, as in
        the paper.
    n_init : int, default=1
        Restarts, one after another: kept is the one whose clusters gain most, in the posterior of
        the codes, over one cluster of all rows.
    batch_size : int or 'auto', default='auto'
        Rows in a step of the autoencoder; 'auto' is n_samples / 40 between 20 and 256.
    learning_rate_init : float, default=1e-3
        Step size of the autoencoder.
    weight_decay : float, default=0.0
        Factor of the squared norm of the autoencoder's weights, halved, in the loss of a batch.
    scale : bool, default=True
        Whether the network sees centred data, divided by one number.
    precision : {'float32', 'bfloat16'}, default='float32'
        Precision of the autoencoder's matrix products in training.
    warm_start : bool, default=False
        Whether `fit` goes on from the last solution, without pretraining.
    device : str or torch.device, default='auto'
        Where to compute.
    dtype : {'float32', 'float64', 'auto'}, default='float32'
        Floating-point type of the nets in training; 'auto' is that of X.
    random_state : int, RandomState instance or None, default=None
        Determines initial weights and centres and the order of rows.
    verbose : int, default=0
        Print a line every ten epochs (1) or every epoch (10).

    Attributes
    ----------
    clusterer_ : DeepDPM
        The copy of ``clusterer`` whose parameters were used. It is not fitted itself.
    n_clusters_ : int
        Number of clusters found.
    labels_ : ndarray of shape (n_samples,)
        Cluster of each training row.
    weights_ : ndarray of shape (n_clusters,)
        Weights of the mixture.
    means_ : ndarray of shape (n_clusters, latent_dim)
        Means of the mixture, among the codes.
    covariances_ : ndarray of shape (n_clusters, latent_dim, latent_dim) or \
            (n_clusters, latent_dim)
        Covariances of the mixture: full, or else diagonals.
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
        Whether no proposal was left in the last clustering; False if ``clusterer__tol=0``.
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

    Parameters of the clustering are in reach of a search:

    >>> from deepmix import DeepDPM
    >>> model.set_params(clusterer=DeepDPM(amortized=False), clusterer__max_clusters=3).fit(X)
    AutoencoderDeepDPM(clusterer=DeepDPM(amortized=False, max_clusters=3),
                       hidden_layer_sizes=(32,), latent_dim=3, random_state=0)
    >>> model.n_clusters_
    3
    """

    clusterer: DeepDPM | None = None
    _: KW_ONLY
    hidden_layer_sizes: p.Layers = (256, 128)
    latent_dim: p.Count | None = None
    encoder: p.Coder | None = None
    decoder: p.Coder | None = None
    pretrain_max_iter: p.CountOrZero = 30
    n_alternations: p.CountOrZero = 3
    max_iter: p.CountOrZero = 10
    reconstruction_weight: p.NonNegative = 1.0
    clustering_weight: p.NonNegative = 1.0
    relative_loss: bool = True
    n_init: p.Count = 1
    batch_size: p.Count | p.Auto = "auto"
    learning_rate_init: p.Positive = 1e-3
    weight_decay: p.NonNegative = 0.0
    scale: bool = True
    precision: p.Precision = "float32"
    warm_start: bool = False
    device: p.Device = "auto"
    dtype: p.Dtype = "float32"
    random_state: p.RandomState = None
    verbose: p.Verbosity = 0

    _network_class = AutoencoderDPMNetwork
    _relative_weights = False
    _transform_output = "encode"
    _centers_attribute = "means_"

    @classmethod
    def from_paper(cls, n_samples: int, **parameters: Any) -> "Self":
        """Make an estimator with the schedule of the authors' program for alternations.

        An encoder of 500-500-2000 and codes of 10 dimensions; both terms of the loss in units of
        data and codes, with lambda .005 and beta 1; a step of 2e-3 with a decay of 5e-4. Three
        clusterings of 300 epochs from three clusters, by nets, with a prior scale of .005 on codes
        as they are, and 100 epochs of the autoencoder between two of them. The autoencoder is
        trained alone for 100 epochs, a number that the authors do not give.

        Parameters
        ----------
        n_samples : int
            Number of rows that it will be fitted to, which turns epochs into steps.
        **parameters
            Override any of these settings; ``clusterer__name`` those of the clustering.

        Returns
        -------
        estimator : AutoencoderDeepDPM
        """
        steps = max(1, -(-n_samples // 128))
        clusterer = DeepDPM.from_paper(
            n_samples, n_clusters_init=3, scaling=None, max_iter=300, freeze=2 * steps
        )
        model = cls(
            clusterer,
            hidden_layer_sizes=(500, 500, 2000),
            latent_dim=10,
            pretrain_max_iter=100,
            n_alternations=2,
            max_iter=100,
            reconstruction_weight=0.005,
            relative_loss=False,
            batch_size=128,
            learning_rate_init=2e-3,
            weight_decay=5e-4,
            scale=False,
        )
        return model.set_params(**parameters)

    def score_samples(self, X: p.Matrix) -> np.ndarray:
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
        return self._apply("log_density", self._check_data(X))

    @own_modes()
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
        check_is_fitted(self)
        labels, noise = self._draw(n_samples, self._n_features_out)
        return self.inverse_transform(draw_rows(fitted_mixture(self), labels, noise)), labels

    # --- Hooks of the base class -----------------------------------------------------

    def _clusterer(self):
        """The parameter ``clusterer``, which nothing changes, or its default: DeepDPM."""
        if self.clusterer is None:
            return DeepDPM(amortized=False, prior_scale="codes")
        return self.clusterer

    def _least_rows(self):
        return "clusterer__n_clusters_init", self._clusterer().n_clusters_init

    def _continues(self):
        # A fit that was interrupted in pretraining has no clusters to go on from.
        return super()._continues() and self._clustered

    def _check_continuation(self, rows):
        super()._check_continuation(rows)
        refuse_other_mixture(self._clusterer(), self._continued)

    def _check_parameters(self):
        super()._check_parameters()
        clusterer = self._clusterer()
        clusterer._validate_params()
        clusterer._check_parameters()
        if clusterer.scaling == "normalize":
            raise ValueError(
                "clusterer__scaling='normalize' leaves nothing of the codes but their directions, "
                "and centres could not be decoded. Use 'standard' or None."
            )

    def _check_total_weight(self, rows):
        warn_of_light_weights(rows)

    def _latent_dim(self, n_features):
        return self.latent_dim or min(LATENT_DIM, n_features)

    def _n_clusters(self):
        """Clusters that a fit begins with."""
        return self._arguments["n_clusters"] if self._continues() else self._least_rows()[1]

    def _mixture_arguments(self, n_features):
        latent_dim, n_clusters = self._latent_dim(n_features), self._n_clusters()
        return self._clusterer()._mixture_arguments(latent_dim, n_clusters)

    def _network_arguments(self, n_features):
        mixture = self._mixture_arguments(n_features)
        return {
            **super()._network_arguments(n_features),
            "clustering_hidden_layer_sizes": mixture["hidden_layer_sizes"],
            "full": mixture["full"],
        }

    def _fitted_arguments(self, fit, network):
        arguments = super()._fitted_arguments(fit, network)
        return {**arguments, "n_clusters": len(network.mixture.means)}

    def _step_work(self, rows):
        latent_dim = self._network_arguments(rows.n_features)["latent_dim"]
        return max(super()._step_work(rows), self._clusterer()._mixture_work(rows, latent_dim))

    def _init_network(self, fit, n_restarts):
        mixture = self._mixture_arguments(fit.rows.n_features)
        refuse_large_matrices(mixture, fit.device)
        # Raises now what it would raise after pretraining.
        self._clusterer()._prior_spread(fit.rows.total_weight, mixture["n_features"])
        network = super()._init_network(fit, n_restarts)
        network.clustering.draw(fit.rng.torch)
        # Equal clusters, for callbacks that predict while the autoencoder is trained alone.
        ones = torch.ones_like(network.mixture.means, dtype=torch.float64)
        start = Mixture(ones[:, 0] / len(ones), 0 * ones, ones, "diag")
        if mixture["full"]:
            start = replace(start, covariances=full_covariances(start), covariance_type="full")
        network.clustering.set_mixture(start)
        return network

    # --- Training --------------------------------------------------------------------

    def _train(self, fit, network):
        clusterer = clone(self._clusterer())
        before = self._pretrain(fit, network)
        if not fit.continues:
            network.error.fill_(reconstruction_unit(network.eval(), fit.rows, LEAST_ERROR))
        history = History(interrupted=before.interrupted, stopped=before.stopped)
        learns = trainable(network.autoencoder) and self.max_iter > 0
        n_clusterings = 1 + (self.n_alternations if learns else 0)
        found = []
        while len(found) < n_clusterings and not history.interrupted:
            if found:
                history = self._train_features(fit, network, history, found[-1])
            if not history.interrupted:
                found.append(self._cluster_codes(fit, network, clusterer, found))
                history.interrupted = found[-1].history.interrupted
                history.stopped |= found[-1].history.stopped
        whole = len(found) == n_clusterings and not history.stopped
        history.converged = whole and found[-1].history.converged
        history.others["n_clusters"] = np.array([len(f.mixture.weights) for f in found], dtype=int)
        attributes = {
            "clusterer_": clusterer,
            "proposals_": numbered(found),
            "_subnets_state": found[-1].subnets_state if found else None,
            "_continued": clusterer._mixture_kind(),
            "_clustered": len(found) > 0,
        }
        # Codes of another restart have other units: what counts is the gain over one cluster.
        criterion = found[-1].criterion + found[-1].of_one if found else 0.0
        return Trained(network.eval(), history.after(before), criterion, attributes=attributes)

    def _minimize(self, fit, network, objective, **options):
        options = {"may_stop": False, "weight_decay": self.weight_decay, **options}
        return super()._minimize(fit, network, objective, **options)

    def _train_features(self, fit, network, before, found):
        """Train the autoencoder for one alternation, with the optimiser of the one before."""
        network.train()
        objective = self._objective_of_features(network, found.mixture)
        optimizers = before.optimizers or None
        history = self._minimize(
            fit, network, objective, max_iter=self.max_iter, optimizers=optimizers
        )
        history.prepend(before)
        history.stopped |= before.stopped
        return history

    def _objective_of_features(self, network, mixture):
        """The objective of an alternation, from the mixture of scaled codes."""
        clustering = network.clustering
        like, width = clustering.mixture.means, clustering.mixture.means.shape[1]
        if not self.relative_loss:
            weights = self.reconstruction_weight, 0.5 * self.clustering_weight
            return FeatureObjective(network, torch.eye(width).to(like), *weights)
        within = torch.einsum("k,kij->ij", mixture.weights, full_covariances(mixture))
        whiten = inverse_cholesky(within)
        matrix = (whiten / clustering.scaler.scale.double()[:, None]).to(like)
        # At the start of the first alternation both terms are their weights, more or less.
        weights = self.reconstruction_weight / float(network.error), self.clustering_weight / width
        return FeatureObjective(network, matrix, *weights)

    def _cluster_codes(self, fit, network, clusterer, found):
        """Cluster the codes as they are now, from the last clustering in ``found``: `CodesFit`."""
        network.eval()
        codes = codes_of(network, fit.rows)
        if found:
            data, start = self._start_again(fit, network, clusterer, codes)
            if self.relative_loss:
                left = share_of(data, start.labels) / found[-1].within
                network.shrinkage.mul_(left).clamp_(min=LEAST_SHRINKAGE)
        else:
            data, start = self._first_start(fit, network.clustering, clusterer, codes)
        clustering = network.clustering
        prior = clusterer._prior(data, float(network.shrinkage))
        stage = {"max_iter": clusterer.max_iter, "task": "clustering"}
        with self._watched(fit, network, **stage) as watchers:
            result = clusterer._cluster(clustering, data, prior, start, fit.rng, **watchers)
        within = max(share_of(data, labels_of(clustering, data)), LEAST_SHRINKAGE)
        one = log_posterior_of_one(data, prior, clusterer)
        return CodesFit(**vars(result), within=within, of_one=one)

    def _first_start(self, fit, clustering, clusterer, codes):
        """Scaled codes, and where the first clustering of a fit begins: ScaledRows, `Start`."""
        if fit.continues:
            mixture = mixture_to_scaled(self, clustering, clusterer.covariance_type)
            start = Start(mixture=mixture, subnets=self._subnets_state)
            return ScaledRows(codes, clustering.scaler), start
        clusterer._fit_feature_scaler(clustering.scaler, codes)
        data = ScaledRows(codes, clustering.scaler)
        return data, Start(labels=clusterer._initial_labels(data, clustering.scaler, fit.rng))

    def _start_again(self, fit, network, clusterer, codes):
        """The same for a clustering after training: the labels are kept, the nets begin anew."""
        labels = labels_of(network.clustering, ScaledRows(codes, network.clustering.scaler))
        arguments = clusterer._mixture_arguments(codes.n_features, clusterer.n_clusters_init)
        network.clustering = DPMNetwork(**arguments).draw(fit.rng.torch).to(fit.device, fit.dtype)
        clusterer._fit_feature_scaler(network.clustering.scaler, codes)
        start = Start(labels=labels.unique(return_inverse=True)[1])
        return ScaledRows(codes, network.clustering.scaler), start

    # --- Fitted state ----------------------------------------------------------------

    def _fitted_attributes(self, fit, network, restart=0):
        attributes = super()._fitted_attributes(fit, network, restart)
        attributes |= mixture_attributes(network.clustering)
        means = torch.tensor(attributes["means_"]).to(fit.device, fit.dtype)
        return {**attributes, "cluster_centers_": decoded(network, means)}

    def _concerns(self, fit, trained):
        history, clusterer = trained.history, self.clusterer_
        ended = self.converged_ or history.interrupted or history.stopped
        if not ended and clusterer.tol > 0:
            yield (
                "The last clustering of AutoencoderDeepDPM did not settle in clusterer__max_iter="
                f"{clusterer.max_iter} epochs: splits or merges may be left. Increase "
                "clusterer__max_iter, or set clusterer__tol=0 for so many epochs and nothing else."
            )
        one = self.n_clusters_ == 1 and clusterer.max_clusters != 1
        if one and not history.interrupted and fit.rows.moments()[1].any():
            yield (
                "AutoencoderDeepDPM found one cluster. Where more are expected: try another "
                "latent_dim, more epochs of pretraining (pretrain_max_iter), or a smaller "
                "clusterer__prior_scale."
            )


@dataclass
class CodesFit(DPMFit):
    """What a clustering of codes returns.

    Attributes
    ----------
    within : float
        `within_share` of the clusters that were found.
    of_one : float
        Log posterior of one cluster of all codes.
    """

    within: float = 1.0
    of_one: float = 0.0


def codes_of(network, rows):
    """Codes of all rows, with their weights: Rows."""
    codes = apply_batchwise(network.encode, rows)
    weight = None if rows.uniform else rows.weight.cpu().double().numpy()
    return Rows(codes, rows.device, rows.dtype, weight)


def labels_of(clustering, data):
    """Clusters of the rows that count: Tensor of shape (n,)."""
    with torch.no_grad():
        return data.map(lambda x, part: clustering.labels(x.to(data.rows.dtype)))


def share_of(data, labels):
    """`within_share` of the clusters that ``labels`` names: float."""
    return within_share(data.statistics(labels, int(labels.max()) + 1, "diag"))


def log_posterior_of_one(data, prior, clusterer):
    """Log posterior of the partition into one cluster of all rows: float."""
    one = torch.zeros(len(data), dtype=torch.long, device=data.weight.device)
    statistics = data.statistics(one, 1, clusterer.covariance_type)
    return float(log_evidence(prior, statistics)) + math.log(clusterer.concentration)


def numbered(found):
    """Proposals of all clusterings in one array, whose first field is the clustering's number."""
    rows = [(i, *row) for i, fit in enumerate(found) for row in fit.proposals.tolist()]
    return np.array(rows, dtype=[("clustering", int), *PROPOSAL.descr])
