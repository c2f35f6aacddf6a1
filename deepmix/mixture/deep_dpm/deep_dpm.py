r"""DeepDPM: a Dirichlet process Gaussian mixture whose responsibilities a network learns.

Ronen, Finder and Freifeld, "DeepDPM: Deep clustering with an unknown number of clusters", CVPR
2022. A clustering net is trained towards the responsibilities of a Gaussian mixture, whose
parameters are MAP estimates under the net's responsibilities; a small net in each cluster finds
two subclusters. Splits and merges, judged by Hastings ratios, change the number of clusters while
training goes on. Implemented: clustering of given features, with and without the nets.
"""

import warnings
from dataclasses import KW_ONLY, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from deepmix import parameters as p
from deepmix._torch import load_state, own_modes, physical_memory
from deepmix.base import BaseDeepMixture
from deepmix.fitting import Trained
from deepmix.gaussian_mixture import Mixture, draw_rows
from deepmix.gaussians import NormalInverseWishart
from deepmix.kmeans import initial_centers, sample_rows
from deepmix.mixture.deep_dpm.network import PRODUCTS, DPMNetwork, SubclusteringNets
from deepmix.mixture.deep_dpm.proposals import LOOK_AHEAD, Splitter
from deepmix.mixture.deep_dpm.scaled_rows import ScaledRows
from deepmix.mixture.deep_dpm.split_merge import Partition
from deepmix.mixture.deep_dpm.training import AmortizedObjective, Start, fit_by_em, fit_by_nets
from deepmix.networks import check_layer_sizes

if TYPE_CHECKING:
    from typing_extensions import Self

# Prior scale 'auto' (see `auto_scale`), in units of the variance of a feature. FLOOR is the part
# for each row: a cluster of all rows is at least .3 % of the data's standard deviation thick, one
# of a tenth of them 1 %. SHARE is the variance at the prior's mode on up to FEW_ROWS rows; on more
# rows this part fades.
FLOOR, SHARE, FEW_ROWS = 1e-5, 0.05, 300
# n_init='auto' makes RESTARTS restarts of amortized training on fewer than RESTARTED_ROWS rows,
# else one. On the 178 wines about half of the starts end in too few clusters, so that one of five
# is very likely good; on 569 rows and more none did.
RESTARTS, RESTARTED_ROWS = 5, 500
# A fit warns if the sample weights sum to less: so few observations do not support two clusters.
LIGHT = 10.0

# Prior scale for each row of an autoencoder's codes of variance one. Codes fill space more evenly
# than an embedding made for clusters does: a cluster of a tenth of the rows is at least about a
# fifth of the standard deviation of the codes thick.
CODE_FLOOR = 3.5e-3

# Number of d x d matrices (statistics, posteriors, factors) that are held at once for each piece
# into which a look ahead cuts a cluster. Measured were ten to fifteen.
MATRICES = 10

# --- Prior -----------------------------------------------------------------------------


def auto_scale(n_rows, n_features):
    r"""Scale of the prior for features of variance one.

    .. math:: 10^{-5} n + 0.05 \, (2 d + 4) \min(1, 300 / n)

    The first part rules where rows are many: the thinnest cluster of a given share of the rows is
    the same for any number of them, so that more rows of the same data find no more clusters. The
    second rules where they are few: there the prior of a cluster must be of the size of a cluster,
    or each new one costs too much.

    Parameters
    ----------
    n_rows : float
        Total weight.
    n_features : int

    Returns
    -------
    float
    """
    return FLOOR * n_rows + SHARE * (2 * n_features + 4) * min(1.0, FEW_ROWS / n_rows)


def scale_for_codes(n_rows, n_features):
    """Scale of the prior for codes of an autoencoder, of variance one: float."""
    return CODE_FLOOR * n_rows


# --- Memory ----------------------------------------------------------------------------


def matrices_bytes(n_clusters, n_features):
    """Bytes that the full covariances of a fit take at its peak, at least.

    The look ahead cuts every cluster into ``2**LOOK_AHEAD`` pieces, each of which has some
    `MATRICES` matrices in float64.

    Parameters
    ----------
    n_clusters, n_features : int

    Returns
    -------
    int
    """
    return 8 * MATRICES * 2**LOOK_AHEAD * n_clusters * n_features**2


# --- Estimator -------------------------------------------------------------------------


def finds_its_number(cls):
    """Decorate an estimator to say, if it is given ``n_clusters``, what to use in place of it."""
    init = cls.__init__
    prefix = "clusterer__" if "clusterer" in cls._parameter_constraints else ""

    @wraps(init)
    def explain(self, *args, **parameters):
        if "n_clusters" in parameters:
            raise TypeError(
                f"{type(self).__name__} finds the number of clusters and has no n_clusters. Set "
                f"{prefix}n_clusters_init to begin with a number, {prefix}max_clusters to stay "
                "below one."
            )
        init(self, *args, **parameters)

    cls.__init__ = explain
    return cls


@finds_its_number
@p.parameters
class DeepDPM(BaseDeepMixture):
    """DeepDPM: a mixture of Gaussians that finds the number of its clusters.

    Training begins with ``n_clusters_init`` clusters, any number, and splits and merges them until
    nothing is left that the posterior of a Dirichlet process mixture favours. The
    responsibilities are learnt by a network (``amortized=True``, the paper's method) or computed
    by EM, which is faster and rarely differs. Features of up to a hundred or so dimensions in
    which clusters are compact, such as embeddings, suit it.

    Parameters
    ----------
    n_clusters_init : int, default=1
        Number of clusters to begin with, by k-means.
    max_clusters : int or None, default=None
        No split goes beyond this number.
    amortized : bool, default=True
        Whether a clustering net learns the responsibilities. Without it the mixture is trained
        by EM, and nothing is random but the k-means of the start and, if ``stochastic``, the
        acceptance of proposals.
    covariance_type : {'full', 'diag', 'spherical'}, default='full'
        Shape of the clusters' covariances, in the scaled features.
    concentration : float, default=10.0
        Concentration of the Dirichlet process (alpha). It has little influence: a proposal is a
        matter of hundreds of nats, to which this adds its logarithm.
    prior_scale : {'auto', 'codes'}, float or array-like, default='auto'
        Scale matrix of the inverse Wishart prior (Psi), in the scaled features: a number for a
        multiple of the identity, an array of shape (n_features,) or (n_features, n_features).
        'auto' is `auto_scale` of the number of rows; 'codes' is 0.0035 times that number, far more,
        for codes of an autoencoder, which fill space evenly. The larger it is, the fewer clusters
        where rows are many.
    prior_dof : float or None, default=None
        Degrees of freedom of the inverse Wishart prior (nu); None is n_features + 2.
    prior_kappa : float, default=0.05
        Number of rows that the prior on the means counts for (kappa).
    scaling : {'standard', 'normalize'} or None, default='standard'
        What is done to the rows first: each feature centred and divided by its deviation, so
        that neither units nor offsets matter; or each row divided by its norm, as in the paper.
    check_unions : bool, default=True
        Whether two clusters are also merged where no cut that the search tries would part their
        union. It makes the result independent of ``n_clusters_init``.
    stochastic : bool, default=False
        Whether a proposal of Hastings ratio H < 1 is accepted with probability H, as in the
        paper, or never.
    hidden_layer_sizes : tuple of int, default=(50,)
        Hidden layers of the clustering net; the subclustering nets have only the first of them.
    split_merge_every : int, default=300
        Gradient steps between two rounds of proposals, at least.
    freeze : int, default=100
        Gradient steps at the start and after each round of proposals before the mixture is
        estimated again.
    n_init : 'auto' or int, default='auto'
        Restarts, one after another: the partition of highest posterior is kept. 'auto' is 5 for
        nets on fewer than 500 rows, by their weight, which end in several partitions, and
        otherwise 1; give a number in a search over folds, which are smaller than the whole. Where
        nothing is random, by EM from one cluster, there is one.
    max_iter : int, default=2000
        Epochs, at most.
    batch_size : int or 'auto', default='auto'
        Rows in a step; 'auto' is n_samples / 40 between 20 and 256.
    learning_rate_init : float, default=2e-3
        Step size of the clustering net.
    subcluster_learning_rate : float, default=5e-3
        Step size of the subclustering nets.
    tol : float, default=1e-3
        Proposals are made once no larger share of the rows changes cluster. 0 trains for
        ``max_iter`` epochs, whether proposals are left or not.
    warm_start : bool, default=False
        Whether `fit` goes on from the last solution: from its clusters, scaling and nets, whatever
        ``n_clusters_init`` is.
    device : str or torch.device, default='auto'
        Where to compute.
    dtype : {'float32', 'float64', 'auto'}, default='float32'
        Floating-point type of the nets in training; 'auto' is that of X. The mixture is estimated
        in float64.
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
        Weights of the mixture, which sum to one.
    means_, cluster_centers_ : ndarray of shape (n_clusters, n_features)
        Means of the mixture, in the units of X (of normalised rows if ``scaling='normalize'``).
    covariances_ : ndarray of shape (n_clusters, n_features, n_features) or \
            (n_clusters, n_features)
        Covariances of the mixture, full or as diagonals (also for 'spherical', since features may
        differ in unit). They include the variance that rounding took from features on a grid.
    proposals_ : ndarray
        Every proposal: a structured array of 'epoch', 'kind' ('split', 'merge', or 'exchange' of
        two clusters for another cut of their union), 'cluster', 'partner', 'log_ratio' (of
        Hastings, or of the posteriors after and before an exchange) and 'accepted'.
    history_ : dict of str to ndarray of shape (`n_iter_`,)
        'loss' and its terms, per row, and 'n_clusters'.
    n_iter_ : int
        Epochs run.
    converged_ : bool
        Whether no proposal was left; False if ``tol=0``, which does not ask.
    device_ : str
        Where it was trained.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, where X has strings for column names.

    See Also
    --------
    ClusteringModule : A number of clusters that is given.
    sklearn.mixture.BayesianGaussianMixture : A truncated Dirichlet process, by variational Bayes.

    References
    ----------
    .. [1] M. Ronen, S. E. Finder, O. Freifeld, "DeepDPM: Deep clustering with an unknown number
       of clusters", CVPR 2022.

    Examples
    --------
    >>> from sklearn.datasets import make_blobs
    >>> from deepmix import DeepDPM
    >>> X, y = make_blobs(n_samples=600, centers=5, random_state=1, cluster_std=0.6)
    >>> model = DeepDPM(amortized=False).fit(X)
    >>> model.n_clusters_
    5
    """

    n_clusters_init: p.Count = 1
    _: KW_ONLY
    max_clusters: p.Count | None = None
    amortized: bool = True
    covariance_type: Literal["full", "diag", "spherical"] = "full"
    concentration: p.Positive = 10.0
    prior_scale: p.Positive | Literal["auto", "codes"] | p.ArrayLike = "auto"
    prior_dof: p.Positive | None = None
    prior_kappa: p.Positive = 0.05
    scaling: Literal["standard", "normalize"] | None = "standard"
    check_unions: bool = True
    stochastic: bool = False
    hidden_layer_sizes: p.Layers = (50,)
    split_merge_every: p.Count = 300
    freeze: p.CountOrZero = 100
    n_init: p.Count | p.Auto = "auto"
    max_iter: p.CountOrZero = 2000
    batch_size: p.Count | p.Auto = "auto"
    learning_rate_init: p.Positive = 2e-3
    subcluster_learning_rate: p.Positive = 5e-3
    tol: p.NonNegative = 1e-3
    warm_start: bool = False
    device: p.Device = "auto"
    dtype: p.Dtype = "float32"
    random_state: p.RandomState = None
    verbose: p.Verbosity = 0

    _network_class = DPMNetwork
    _relative_weights = False
    _transform_output = "resp"
    _partition_class, _objective_class = Partition, AmortizedObjective

    @classmethod
    def from_paper(cls, n_samples: int, **parameters: Any) -> "Self":
        """Make an estimator with the schedule of the authors' program.

        Normalised rows, a prior scale of 0.005 and a kappa of 1e-4, batches of 128, a learning rate
        of 5e-4, a round of proposals every 30 epochs with the mixture frozen for 5, proposals
        accepted with probability min(1, H), no check of unions, 500 epochs, one start.

        Parameters
        ----------
        n_samples : int
            Number of rows that it will be fitted to, which turns epochs into steps.
        **parameters
            Override any of these settings.

        Returns
        -------
        estimator : DeepDPM
        """
        steps = max(1, -(-n_samples // 128))
        settings = {
            "prior_scale": 0.005,
            "prior_kappa": 1e-4,
            "scaling": "normalize",
            "check_unions": False,
            "stochastic": True,
            "split_merge_every": 30 * steps,
            "freeze": 5 * steps,
            "max_iter": 500,
            "batch_size": 128,
            "learning_rate_init": 5e-4,
            "tol": 1.0,
            "n_init": 1,
        }
        return cls(**{**settings, **parameters})

    def score_samples(self, X: p.Matrix) -> np.ndarray:
        """Log-density of each row under the mixture.

        Parameters
        ----------
        X : {array-like, sparse matrix, torch.Tensor} of shape (n_samples, n_features)

        Returns
        -------
        log_density : ndarray of shape (n_samples,)
            In nats, for data in the units of X.
        """
        return self._apply("log_density", self._check_data(X))

    @own_modes()
    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Draw rows from the mixture.

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
        labels, noise = self._draw(n_samples, self.means_.shape[1])
        return draw_rows(fitted_mixture(self), labels, noise), labels

    # --- Hooks of the base class -----------------------------------------------------

    @property
    def _n_features_out(self):
        return self.n_clusters_

    def _least_rows(self):
        return "n_clusters_init", self.n_clusters_init

    def _n_restarts(self, fit):
        random = self.amortized or self.stochastic or self.n_clusters_init > 1
        if self.n_init == "auto" and not fit.continues:
            return RESTARTS if self.amortized and fit.rows.total_weight < RESTARTED_ROWS else 1
        return super()._n_restarts(fit) if random else 1

    def _check_continuation(self, rows):
        super()._check_continuation(rows)
        refuse_other_mixture(self, self._continued)

    def _training_dtype(self, X):
        # Without nets nothing is gained by fewer digits.
        return super()._training_dtype(X) if self.amortized else torch.float64

    def _check_parameters(self):
        super()._check_parameters()
        sizes = self.hidden_layer_sizes
        check_layer_sizes(sizes)
        if len(sizes) == 0:
            raise ValueError(
                f"hidden_layer_sizes must hold one or more integers >= 1; got {sizes!r}. "
                "(50,) is the paper's."
            )
        if self.max_clusters is not None and self.max_clusters < self.n_clusters_init:
            raise ValueError(
                f"max_clusters={self.max_clusters} should be >= n_clusters_init="
                f"{self.n_clusters_init}. Raise the one or lower the other."
            )

    def _network_arguments(self, n_features):
        n_clusters = self._arguments["n_clusters"] if self._continues() else self.n_clusters_init
        return self._mixture_arguments(n_features, n_clusters)

    def _mixture_arguments(self, n_features, n_clusters):
        """Arguments of a `DPMNetwork`, here and in an estimator that clusters codes by this one."""
        return {
            "n_features": n_features,
            "n_clusters": n_clusters,
            "hidden_layer_sizes": tuple(self.hidden_layer_sizes) if self.amortized else None,
            "full": self.covariance_type == "full",
            "normalize": self.scaling == "normalize",
        }

    def _fitted_arguments(self, fit, network):
        arguments = super()._fitted_arguments(fit, network)
        return {**arguments, "n_clusters": len(network.mixture.means)}

    def _init_network(self, fit, n_restarts):
        arguments = self._network_arguments(fit.rows.n_features)
        refuse_large_matrices(arguments, fit.device)
        network = DPMNetwork(**arguments).draw(fit.rng.torch).to(fit.dtype)
        self._fit_feature_scaler(network.scaler, fit.rows)
        return network

    def _fit_feature_scaler(self, scaler, rows):
        if self.scaling == "standard":
            scaler.fit(*rows.moments())

    def _step_work(self, rows):
        return max(super()._step_work(rows), self._mixture_work(rows, rows.n_features))

    def _mixture_work(self, rows, n_features):
        """Multiply-adds that a piece of rows needs for its densities."""
        products = min(PRODUCTS, len(rows) * n_features * max(10, self.n_clusters_init))
        return products * (n_features if self.covariance_type == "full" else 1)

    def _check_total_weight(self, rows):
        warn_of_light_weights(rows)

    def _train(self, fit, network):
        data = ScaledRows(fit.rows, network.scaler)
        prior = self._prior(data)
        if fit.continues:
            mixture = mixture_to_scaled(self, network, self.covariance_type)
            start = Start(mixture=mixture, subnets=self._subnets_state)
        else:
            start = Start(labels=self._initial_labels(data, network.scaler, fit.rng))
        with self._watched(fit, network, max_iter=self.max_iter) as watchers:
            found = self._cluster(network, data, prior, start, fit.rng, **watchers)
        found.history.others["n_clusters"] = found.n_clusters
        attributes = {
            "proposals_": found.proposals,
            "_subnets_state": found.subnets_state,
            "_continued": self._mixture_kind(),
        }
        return Trained(network.eval(), found.history, found.criterion, attributes=attributes)

    def _cluster(self, network, data, prior, start, rng, **watchers):
        """Find the clusters of these rows, one whole training of the mixture: `DPMFit`."""
        splitter = Splitter(data, prior, float(np.log(self.concentration)))
        draws = rng.torch if self.stochastic else None
        partition = self._partition_class(
            data, prior, splitter, self.max_clusters, self.check_unions, draws
        )
        like = network.mixture.means
        if start.mixture is None:
            partition.start(start.labels)
        else:
            labels = data.map(lambda x, part: network.labels(x.to(like.dtype)))
            partition.resume(labels, start.mixture)
        options = {"max_iter": self.max_iter, "tol": self.tol, **watchers}
        if not self.amortized:
            return fit_by_em(network, partition, **options)
        width = self.hidden_layer_sizes[0]
        subnets = SubclusteringNets(like.shape[1], partition.n_clusters, width).draw(rng.torch)
        if start.mixture is None:
            network.inherit(torch.arange(partition.n_clusters) % network.net[-1].out_features)
        else:
            load_state(subnets, start.subnets)
        return fit_by_nets(
            network,
            partition,
            subnets.to(like),
            batch_size=self._batch_size(data.rows),
            learning_rate=self.learning_rate_init,
            subcluster_learning_rate=self.subcluster_learning_rate,
            split_merge_every=self.split_merge_every,
            freeze=self.freeze,
            generator=rng.torch,
            objective_class=self._objective_class,
            **options,
        )

    def _mixture_kind(self):
        """Parameters that must not change where training goes on from a fitted mixture: dict."""
        return {name: getattr(self, name) for name in ("covariance_type", "scaling")}

    def _initial_labels(self, data, scaler, rng):
        """Initial labels, all zero or by k-means: Tensor of shape (n,)."""
        rows, n_clusters = data.rows, self.n_clusters_init
        if n_clusters == 1:
            return torch.zeros(len(data), dtype=torch.long, device=rows.device)
        X, weight = sample_rows(rows, scaler, n_clusters, rng.numpy)
        centers = initial_centers("k-means", X, n_clusters, rng.numpy, weight)
        centers = torch.tensor(centers, dtype=torch.float64, device=rows.device)
        labels = data.map(lambda x, part: torch.cdist(x, centers).argmin(dim=1))
        return labels.unique(return_inverse=True)[1]

    def _prior(self, data, factor=1.0):
        """The normal-inverse-Wishart prior around the mean of the scaled rows.

        Parameters
        ----------
        data : ScaledRows
        factor : float
            Factor that multiplies the scale matrix of the prior.
        """
        mean = sum(data.weight[part] @ x for part, x in data.chunks()) / data.total_weight
        dof, scale = self._prior_spread(data.total_weight, len(mean))
        kappa, dof = mean.new_tensor(self.prior_kappa), mean.new_tensor(dof)
        return NormalInverseWishart(mean, kappa, dof, factor * mean.new_tensor(scale))

    def _prior_spread(self, total_weight, n_features):
        """Degrees of freedom and scale of the prior."""
        dof = n_features + 2.0 if self.prior_dof is None else float(self.prior_dof)
        if self.covariance_type == "full" and dof <= n_features - 1:
            raise ValueError(
                f"prior_dof={self.prior_dof} should be > n_features - 1 = {n_features - 1}. "
                "Leave it at None for n_features + 2."
            )
        return dof, self._prior_scale(total_weight, n_features)

    def _prior_scale(self, total_weight, n_features):
        if isinstance(self.prior_scale, str):
            rule = {"auto": auto_scale, "codes": scale_for_codes}[self.prior_scale]
            scale = np.full(n_features, rule(total_weight, n_features))
        else:
            scale = np.asarray(self.prior_scale, dtype=np.float64)
            scale = np.full(n_features, float(scale)) if scale.ndim == 0 else scale
        diagonal = scale.diagonal() if scale.ndim == 2 else scale
        valid = scale.shape in ((n_features,), (n_features, n_features))
        valid = valid and bool(np.all(np.isfinite(scale)) and np.all(diagonal > 0))
        if valid and scale.ndim == 2:
            valid = np.allclose(scale, scale.T) and np.linalg.eigvalsh(scale)[0] > 0
        if not valid:
            raise ValueError(
                f"prior_scale must be 'auto', 'codes', a positive number, or an array of shape "
                f"({n_features},) or ({n_features}, {n_features}) that is positive definite; got "
                f"{self.prior_scale!r}."
            )
        if self.covariance_type == "full":
            return scale if scale.ndim == 2 else np.diag(scale)
        # One variance for all features is informed by each of them.
        return diagonal if self.covariance_type == "diag" else diagonal.sum()

    def _fitted_attributes(self, fit, network, restart=0):
        attributes = super()._fitted_attributes(fit, network, restart)
        return {**attributes, **mixture_attributes(network)}

    def _concerns(self, fit, trained):
        history = trained.history
        ended = self.converged_ or history.interrupted or history.stopped
        if not ended and self.tol > 0:
            yield (
                f"DeepDPM did not settle in {self.n_iter_} epochs (max_iter={self.max_iter}): "
                "splits or merges may be left. Increase max_iter, or set tol=0 to train for "
                "max_iter epochs and nothing else."
            )
        one = self.n_clusters_ == 1 and self.max_clusters != 1
        if one and not history.interrupted and fit.rows.moments()[1].any():
            yield (
                "DeepDPM found one cluster. Where more are expected: reduce many columns by PCA or "
                "UMAP to 5 to 50; try scaling=None where all columns have one unit, "
                "covariance_type='diag' or 'spherical', or a smaller prior_scale."
            )


# --- For estimators of this mixture ------------------------------------------------------


def refuse_large_matrices(arguments, device):
    """Raise ValueError for full covariances of so many features that no memory holds them."""
    n_clusters, n_features = arguments["n_clusters"], arguments["n_features"]
    needed, present = matrices_bytes(n_clusters, n_features), physical_memory(device)
    if arguments["full"] and needed > present:
        raise ValueError(
            f"Full covariances of n_features={n_features} and {n_clusters} cluster(s) take "
            f"{needed / 2**30:.3g} GiB at once; {device} has {present / 2**30:.3g} GiB. Use "
            "covariance_type='diag' or 'spherical', reduce the features first (PCA), or learn "
            "fewer (AutoencoderDeepDPM, latent_dim)."
        )


def refuse_other_mixture(clusterer, before):
    """Raise ValueError if training cannot go on from a mixture of other parameters."""
    for name, now in clusterer._mixture_kind().items():
        if now != before[name]:
            raise ValueError(
                f"Training goes on with a model of {name}={before[name]!r}; got {name}={now!r}. "
                "Call fit with warm_start=False to start anew."
            )


def warn_of_light_weights(rows):
    """Warn if the sample weights together count no more than a few rows."""
    n_rows = len(rows.visited)
    if rows.total_weight < min(LIGHT, n_rows / 2):
        warnings.warn(
            f"The sample weights sum to {rows.total_weight:.3g}, and {n_rows} rows count no "
            "more than so many rows of weight 1. Multiply the weights by the number of rows "
            "divided by their sum if only their ratios are meant.",
            UserWarning,
            stacklevel=7,  # fit's caller
        )


# --- Units -----------------------------------------------------------------------------


def mixture_attributes(network):
    """Fitted attributes of the mixture, in the units of the data: dict of ndarray."""
    mixture = network.estimate.map(torch.Tensor.cpu)
    scale, shift = (v.cpu().double() for v in (network.scaler.scale, network.scaler.mean))
    if mixture.covariance_type == "full":
        covariances = mixture.covariances * scale[:, None] * scale
    else:
        covariances = mixture.covariances.view(len(mixture.means), -1) * scale.square()
    mixture = replace(mixture, means=mixture.means * scale + shift, covariances=covariances)
    fitted = mixture.attributes()
    return {**fitted, "cluster_centers_": fitted["means_"].copy()}


def fitted_mixture(model):
    """The `Mixture` that a fitted model has, in the units of the data."""
    arrays = (model.weights_, model.means_, model.covariances_)
    tensors = (torch.tensor(np.asarray(v), dtype=torch.float64) for v in arrays)
    return Mixture(*tensors, "full" if np.ndim(model.covariances_) == 3 else "diag")


def mixture_to_scaled(model, network, covariance_type):
    """The `Mixture` of scaled rows that a fitted model has: `mixture_attributes` undone."""
    scale, shift = (v.double() for v in (network.scaler.scale, network.scaler.mean))
    weights, means, covariances = (v.to(scale.device) for v in fitted_mixture(model).tensors)
    if covariances.dim() == 3:
        covariances = covariances / scale[:, None] / scale
    else:
        covariances = covariances / scale.square()
        if covariance_type == "spherical":
            covariances = covariances.mean(dim=1)
    return Mixture(weights, (means - shift) / scale, covariances, covariance_type)
