r"""AE-CM: a clustering module inside a deep autoencoder, trained as one.

Boubekki, Kampffmeyer, Brefeld and Jenssen, "Joint optimization of an autoencoder for
clustering and embedding", Machine Learning 110 (2021). The autoencoder bends the data until a
spherical mixture with orthonormal centres fits its codes; reconstruction keeps the codes honest
(Eq. 10). Implemented: Secs. 4.2 and 5.3, the initialisations AE-CM^p and AE-CM^r, and two of
ours that neither forget the k-means labels nor stall.
"""

from dataclasses import KW_ONLY
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from sklearn.metrics import pairwise_distances_argmin
from sklearn.utils.validation import check_is_fitted

from deepmix import parameters as p
from deepmix._torch import full_precision, sum_batchwise
from deepmix.autoencoder import AutoencoderMixture
from deepmix.fitting import Trained
from deepmix.gaussian_mixture import fit_gaussian_mixture
from deepmix.kmeans import first_best, initial_centers, sample_rows
from deepmix.linalg import inverse_cholesky
from deepmix.losses import squared_error
from deepmix.mixture.clustering_module.center_mixture import CenterMixture
from deepmix.mixture.clustering_module.clustering_module import (
    ClusteringObjective,
    paper_settings,
    restart_criterion,
)
from deepmix.mixture.clustering_module.losses import (
    DirichletPrior,
    ambiguity,
    gini,
    inertia,
    log_mean_resp,
    orthonormality,
    reconstruction,
)
from deepmix.mixture.clustering_module.network import AECMNetwork
from deepmix.networks import trainable
from deepmix.training import History, Objective, Phase

if TYPE_CHECKING:
    from typing_extensions import Self


class PaperSettings(NamedTuple):
    """Settings for one data set, a column of Table 13; the paper's lambda is always 1."""

    concentration: float
    reconstruction_weight: float
    batch_size: int
    latent_dim: int


PAPER_SETTINGS = {
    "mnist": PaperSettings(230, 5, 500, 10),
    "fashion_mnist": PaperSettings(13, 47, 175, 10),
    "usps": PaperSettings(20, 0.5, 256, 10),
    "cifar10": PaperSettings(64, 1, 256, 10),
    "reuters10k": PaperSettings(2, 1, 256, 100),
    "news20": PaperSettings(10, 232, 300, 100),
    "10x73k": PaperSettings(7, 15, 7, 10),
    "pendigits": PaperSettings(13, 0.5, 100, 10),
}

# Squared distance of two orthonormal centres: the unit of concentration='auto'.
CENTER_DISTANCE = 2.0
# init='pretrain' starts from the logits -tau |x - mu_k|^2, after a map that brings the mean squared
# norm of the centres mu_k to one. tau is this number times n_clusters: twice the value below which
# uniform responsibilities are stable, and soft enough that rows can still change sides.
START_TEMPERATURE = 0.5
KMEANS_RESTARTS = 20  # as the authors'
# Centres are started from at most CODES rows, and from fewer if an E-step of the mixture would take
# more than MIXTURE_BUDGET numbers (64 MiB).
CODES, MIXTURE_BUDGET = 20_000, 2**23


# --- Training --------------------------------------------------------------------------


class JointObjective(Objective):
    """The loss of Eq. 10: autoencoder and clustering module together.

    Parameters
    ----------
    network : AECMNetwork
    prior : DirichletPrior
    reconstruction_weight, orthogonality_weight : float
        The paper's beta and lambda.
    """

    def __init__(self, network, prior, reconstruction_weight, orthogonality_weight):
        self.network, self.prior = network, prior
        self.reconstruction_weight = reconstruction_weight
        self.orthogonality_weight = orthogonality_weight

    def phases(self):
        network = self.network
        parameters = (*trainable(network.autoencoder), *network.clustering.parameters())
        return (Phase(parameters, self.step),)

    def step(self, batch, index, weight):
        x = self.network.scaler(batch)
        code, x_hat = self.network.autoencoder(x, return_code=True)
        with full_precision(x.device):  # autocast, where it is on, concerns the autoencoder only
            z, x_hat = self.network.whitener(code.to(x)), x_hat.to(x)
            log_resp = self.network.log_resp(z)
            terms = self.row_terms(x, x_hat, z, log_resp.exp(), weight)
            return {**terms, **self.batch_terms(log_mean_resp(log_resp, weight), weight.sum())}

    def row_terms(self, x, x_hat, z, resp, weight):
        """Terms of Eq. 10 that are sums over rows."""
        centers = self.network.clustering.centers()[0]
        return {
            "reconstruction": self.reconstruction_weight * squared_error(x, x_hat, weight),
            "clustering": reconstruction(z, resp, centers, weight),
            "sparsity": gini(resp, weight),
        }

    def batch_terms(self, log_mean, total_weight):
        """Terms of Eq. 10 that a batch has once, from its mean responsibilities."""
        centers = self.network.clustering.centers()[0]
        return {
            "balance": -(self.prior.strength_of(log_mean, total_weight) * log_mean).sum(),
            "orthonormality": self.orthogonality_weight * orthonormality(centers),
        }

    def full_loss(self, rows, batch_size):
        """Loss of an epoch if each batch had the mean responsibilities of all rows: float."""

        def sums(batch, weight):
            x = self.network.scaler(batch)
            code, x_hat = self.network.autoencoder(x, return_code=True)
            z = self.network.whitener(code)
            resp = self.network.log_resp(z).exp()
            terms = self.row_terms(x, x_hat, z, resp, weight)
            return torch.cat([sum(terms.values())[None], weight @ resp]).double().cpu()

        total, *nk = sum_batchwise(sums, rows)
        n_steps = len(rows.batch_sizes(batch_size))
        # A cluster whose responsibilities underflow in every row is dead, not infinitely bad.
        mean = (torch.stack(nk) / rows.total_weight).clamp_min(torch.finfo(rows.dtype).tiny)
        log_mean = mean.log().to(rows.device, rows.dtype)
        share = log_mean.new_tensor(rows.total_weight / n_steps)
        with torch.inference_mode():
            once = sum(self.batch_terms(log_mean, share).values())
        return float(total) + n_steps * float(once)


# --- Estimator -------------------------------------------------------------------------


@p.parameters
class AECM(AutoencoderMixture, CenterMixture):
    """AE-CM: a clustering module and a deep autoencoder trained together.

    The encoder learns codes in which the clusters are spheres around orthonormal centres, the
    decoder turns centres and mixtures of them back into data. For clusters that no straight
    line separates in the data, such as handwritten digits.

    Parameters
    ----------
    n_clusters : int, default=8
        Number of clusters.
    hidden_layer_sizes : tuple of int, default=(500, 500, 2000)
        Layers of the encoder between data and codes; the decoder has them in reverse. An empty
        tuple makes a linear autoencoder.
    latent_dim : int or None, default=None
        Dimension of the codes; None takes the larger of 10 and ``n_clusters``. With fewer
        dimensions than clusters the centres cannot be orthonormal.
    init : {'pretrain-gmm', 'pretrain', 'pretrain-pinv', 'orthonormal', 'random'}, \
            default='pretrain-gmm'
        Where joint training starts.

        - 'pretrain-gmm': an autoencoder is trained, a full-covariance mixture fitted to its
          codes, the codes whitened by what varies within its components, and the clustering
          module started so that it assigns each row to the nearest of their means.
        - 'pretrain': k-means on the codes instead, and no whitening; the clustering module
          starts with the labels of k-means.
        - 'pretrain-pinv': the paper's AE-CM^p, with the pseudo-inverse and
          ``clustering_max_iter`` epochs of the clustering module alone.
        - 'orthonormal': random weights, orthonormal centres U and logits ``logit_gain * z @ U.T``.
        - 'random': the paper's AE-CM^r.
    n_init : int, default=1
        Restarts, one after another.
    selection : {'loss', 'sparsity'}, default='loss'
        Which restart is kept: that of lowest loss, or of lowest L_sp (Sec. 5.3.4), on all rows.
    concentration : 'auto', float or array-like of shape (n_clusters,), default='auto'
        Concentration of the Dirichlet prior on the mean responsibilities of a batch (alpha). A
        float is the paper's, which depends on the batch size; 'auto' is 1 plus 0.1 times the weight
        of the batch. An array is paired with the clusters by size.
    reconstruction_weight : float, default=10.0
        Weight of the autoencoder's squared error (beta). With ``scale=True`` the error is
        counted in units of the data's total variance, else in those of X, as in the paper.
    orthogonality_weight : float, default=1.0
        Weight of the distance of the centres from orthonormality (lambda), once a batch.
    logit_gain : float or None, default=None
        Factor on the initial logits of 'orthonormal' and 'random'. Below about half of
        ``n_clusters`` uniform responsibilities are a stable state. None takes 0.8 times
        ``n_clusters`` for 'orthonormal' and 1 for 'random'.
    encoder, decoder : callable, torch.nn.Module or None, default=None
        Networks to use instead of ``hidden_layer_sizes``: a callable ``(n_in, n_out) ->
        nn.Module``, or a module, which is copied with its weights and never trained in place.
        ``nn.Dropout`` in them draws from the fit's generator; other random layers, and dropout that
        is called as a function, draw from torch's global one.
    pretrain_max_iter : int, default=20
        Epochs of the autoencoder alone, at most.
    clustering_max_iter : int, default=100
        Epochs of the clustering module alone, for 'pretrain-pinv'.
    max_iter : int, default=100
        Epochs of joint training, at most.
    batch_size : int or 'auto', default='auto'
        Rows in a step; 'auto' is n_samples / 40 between 20 and 128.
    learning_rate_init : float, default=0.001
        Step size.
    solver : {'adam', 'sgd'}, default='adam'
        Optimiser.
    epsilon : float, default=1e-8
        Term added to the denominator of Adam's step for numerical stability.
    max_grad_norm : float or None, default=None
        Clip the gradient to this norm.
    averaging : bool, default=True
        Whether an epoch more ends training, whose mean weights are kept (Sec. 4.1).
    scale : bool, default=True
        Whether the network sees centred data, divided by one number; decoded centres and
        reconstructions are in the units of X.
    precision : {'float32', 'bfloat16'}, default='float32'
        Precision of the autoencoder's matrix products in training; 'bfloat16' is faster where the
        hardware has it. The loss stays float32.
    tol : float, default=1e-3
        An epoch counts as improvement if it lowers the loss by this fraction. 0 trains for
        ``max_iter`` epochs.
    n_iter_no_change : int, default=10
        Epochs without improvement that end a stage.
    warm_start : bool, default=False
        Whether `fit` goes on from the last solution, without pretraining.
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
        Decoded centres, in the units of X.
    latent_centers_ : ndarray of shape (n_clusters, latent_dim)
        Centres among the codes.
    latent_variance_ : float
        Variance of the codes around their centres, per dimension.
    labels_ : ndarray of shape (n_samples,)
        Cluster of each training row.
    weights_ : ndarray of shape (n_clusters,)
        Mean responsibilities.
    variance_ : float
        Variance of the data around the decoded centres, per feature.
    n_clusters_ : int
        Number of clusters.
    history_ : dict of str to ndarray of shape (`n_iter_`,)
        'loss' and its terms 'reconstruction', 'clustering', 'sparsity', 'balance' and
        'orthonormality', per row; and 'pretrain_reconstruction', of its own length.
    n_iter_ : int
        Epochs of joint training, the averaging epoch not counted.
    converged_ : bool
        Whether ``tol`` ended joint training.
    device_ : str
        Where it was trained.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, where X has strings for column names.

    See Also
    --------
    ClusteringModule : The same without the autoencoder.
    deepmix.pretrain_autoencoder : One autoencoder for several estimators.

    References
    ----------
    .. [1] A. Boubekki, M. Kampffmeyer, U. Brefeld, R. Jenssen, "Joint optimization of an
       autoencoder for clustering and embedding", Machine Learning 110, 2021.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from deepmix import AECM
    >>> X = load_iris().data
    >>> model = AECM(
    ...     3, hidden_layer_sizes=(32,), pretrain_max_iter=10, max_iter=10, tol=0, random_state=0
    ... ).fit(X)
    >>> model.transform(X).shape
    (150, 10)
    >>> model.cluster_centers_.shape
    (3, 4)
    """

    n_clusters: p.Count = 8
    _: KW_ONLY
    hidden_layer_sizes: p.Layers = (500, 500, 2000)
    latent_dim: p.Count | None = None
    init: Literal["pretrain-gmm", "pretrain", "pretrain-pinv", "orthonormal", "random"] = (
        "pretrain-gmm"
    )
    n_init: p.Count = 1
    selection: Literal["loss", "sparsity"] = "loss"
    concentration: p.Positive | p.Auto | p.ArrayLike = "auto"
    reconstruction_weight: p.NonNegative = 10.0
    orthogonality_weight: p.NonNegative = 1.0
    logit_gain: p.Positive | None = None
    encoder: p.Coder | None = None
    decoder: p.Coder | None = None
    pretrain_max_iter: p.CountOrZero = 20
    clustering_max_iter: p.CountOrZero = 100
    max_iter: p.CountOrZero = 100
    batch_size: p.Count | p.Auto = "auto"
    learning_rate_init: p.Positive = 1e-3
    solver: p.Solver = "adam"
    epsilon: p.Positive = 1e-8
    max_grad_norm: p.Positive | None = None
    averaging: bool = True
    scale: bool = True
    precision: p.Precision = "float32"
    tol: p.NonNegative = 1e-3
    n_iter_no_change: p.Count = 10
    warm_start: bool = False
    device: p.Device = "auto"
    dtype: p.Dtype = "float32"
    random_state: p.RandomState = None
    verbose: p.Verbosity = 0

    _network_class = AECMNetwork
    _transform_output = "encode"
    _auto_batch_size = (20, 128)  # the nets want more steps than the clustering module

    @classmethod
    def from_paper(
        cls, dataset: str, n_clusters: int = 10, *, init: str = "random", **parameters: Any
    ) -> "Self":
        """Make an estimator with the settings of the paper (Appendix 3 and Table 13).

        No scaling, Adam with a step of 1e-3 and an epsilon of 1e-3, 150 epochs and the averaging
        epoch, one restart, pretraining for 100 epochs.

        Parameters
        ----------
        dataset : {'mnist', 'fashion_mnist', 'usps', 'cifar10', 'reuters10k', 'news20', \
                '10x73k', 'pendigits'}
            Data set whose concentration, weights, batch size and latent dimension are taken.
        n_clusters : int, default=10
        init : {'random', 'pretrain-pinv'}, default='random'
            The paper's AE-CM^r or AE-CM^p.
        **parameters
            Override any of these settings.

        Returns
        -------
        estimator : AECM
        """
        settings = {
            **paper_settings(PAPER_SETTINGS, dataset),
            "init": init,
            "pretrain_max_iter": 100,
            "max_iter": 150,
            "epsilon": 1e-3,
            "scale": False,
            "tol": 0,
        }
        return cls(n_clusters, **{**settings, **parameters})

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Draw codes from the spherical mixture around the centres, and decode them.

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
        codes = self.latent_centers_[labels] + np.sqrt(self.latent_variance_) * noise
        return self.inverse_transform(codes), labels

    # --- Hooks of the base class -----------------------------------------------------

    def _latent_dim(self, n_features):
        return self.latent_dim or max(10, self.n_clusters)

    @property
    def _weights_scheme(self):
        return "glorot-normal" if self.init == "random" else "glorot"

    def _init_network(self, fit, n_restarts):
        network = super()._init_network(fit, n_restarts)
        if self.init == "random":
            network.clustering.init_random(fit.rng.torch, self.logit_gain or 1.0)
        elif self.init == "orthonormal":
            gain = self.logit_gain or 0.8 * self.n_clusters
            network.clustering.init_orthonormal(fit.rng.torch, gain)
        return network

    def _objective(self, fit, network):
        prior = DirichletPrior(self.concentration, CENTER_DISTANCE, network.scaler.scale)
        # The standardised data have variance one in each feature, a row has n_features of it.
        unit = fit.rows.n_features if self.scale else 1.0
        return JointObjective(
            network, prior, self.reconstruction_weight / unit, self.orthogonality_weight
        )

    def _train(self, fit, network):
        before, history = History(), History(interrupted=True)
        if self.init.startswith("pretrain") and not fit.continues:
            before = self._pretrain(fit, network)
            before.interrupted |= self._start(fit, network.eval(), before.interrupted)
        if not before.interrupted:
            objective = self._objective(fit, network.train())
            history = self._minimize_and_average(fit, network, objective)
        network.eval()
        return Trained(network, history.after(before), self._criterion(fit, network))

    def _criterion(self, fit, network):
        if self.selection == "sparsity":
            return restart_criterion(ambiguity, network.encode, network.clustering, fit.rows)
        return self._objective(fit, network).full_loss(fit.rows, self._batch_size(fit.rows))

    def _start(self, fit, network, interrupted):
        """Start the clustering module from the codes; return whether Ctrl-C interrupted it."""
        random_state, n_codes = fit.rng.numpy, self._n_codes(network)
        sample = sample_rows(fit.rows, network.encode, self.n_clusters, random_state, n_codes)
        if self.init == "pretrain-gmm":
            self._start_from_mixture(network, *sample, random_state)
        else:
            self._start_from_kmeans(network, *sample, random_state)
        if self.init != "pretrain-pinv" or interrupted:
            return False
        prior = DirichletPrior(self.concentration, CENTER_DISTANCE, network.scaler.scale)
        alone = ClusteringObjective(network.encode, network.clustering, prior)
        stage = {"max_iter": self.clustering_max_iter, "task": "clustering"}
        return self._minimize(fit, network, alone, **stage).interrupted

    def _n_codes(self, network):
        return min(CODES, MIXTURE_BUDGET // network.clustering.decoder_weight.numel())

    def _start_from_mixture(self, network, codes, weight, random_state):
        """Whiten the codes by what varies within the clusters of a full-covariance mixture."""
        means, within = best_mixture(codes, self.n_clusters, random_state, weight)
        self._start_at(network, means, inverse_cholesky(within))

    def _start_from_kmeans(self, network, codes, weight, random_state):
        centers = initial_centers(
            "k-means", codes, self.n_clusters, random_state, weight, n_init=KMEANS_RESTARTS
        )
        centers = torch.from_numpy(centers).double()
        if self.init == "pretrain-pinv":
            network.clustering.init_pseudo_inverse(centers[None])
        else:
            self._start_at(network, centers, torch.eye(codes.shape[1], dtype=centers.dtype))

    def _start_at(self, network, centers, matrix):
        """Set centres among the codes and their posterior logits, after an affine map of both."""
        origin = centers.mean(dim=0)
        moved = (centers - origin) @ matrix.to(centers)
        size = moved.square().sum(dim=1).mean().sqrt() or 1.0
        network.whitener.fit(origin, matrix / size)
        temperature = START_TEMPERATURE * self.n_clusters
        network.clustering.init_centers((moved / size)[None], temperature)

    def _fitted_attributes(self, fit, network, restart=0):
        attributes = super()._fitted_attributes(fit, network, restart)
        centers = network.clustering.centers()
        spread = restart_criterion(inertia, network.encode, network.clustering, fit.rows)[0]
        latent = {
            "latent_centers_": centers[0].detach().double().cpu().numpy(),
            "latent_variance_": max(float(spread), 0.0) / fit.rows.total_weight / centers.shape[2],
        }
        return {**attributes, **latent}

    def _concerns(self, fit, trained):
        yield from super()._concerns(fit, trained)
        uniform = 1 - 1 / self.n_clusters_
        impurity = self.history_["sparsity"][-1] if self.n_iter_ else 0.0
        if self.n_clusters_ > 1 and impurity > 0.8 * uniform:
            yield (
                f"The responsibilities are still near uniform (Gini impurity {impurity:.3f} of at "
                f"most {uniform:.3f}): training has not left the plateau on which all clusters "
                "look alike. Raise logit_gain or concentration, train longer, or use another init."
            )


# --- Start -----------------------------------------------------------------------------


def best_mixture(X, n_clusters, random_state, sample_weight=None, n_init=5):
    """Full-covariance mixture of highest likelihood out of runs of EM from k-means.

    Parameters
    ----------
    X : ndarray of shape (n_samples, n_features)
    n_clusters : int
    random_state : RandomState
    sample_weight : ndarray of shape (n_samples,) or None
    n_init : int, default=5

    Returns
    -------
    means : Tensor of shape (n_clusters, n_features)
    within : Tensor of shape (n_features, n_features)
        Mean covariance of the clusters.
    """
    origin = np.average(X, axis=0, weights=sample_weight)
    x = torch.from_numpy(X - origin).double()
    weight = None if sample_weight is None else torch.from_numpy(sample_weight)
    # Codes may have dead dimensions: relative to their spread, not to one.
    reg_covar = 1e-3 * float(np.average(x.square().mean(dim=1), weights=sample_weight)) or 1.0
    runs = []
    for _ in range(n_init):
        centers = initial_centers("k-means", X, n_clusters, random_state, sample_weight)
        nearest = pairwise_distances_argmin(X, centers)
        resp = torch.nn.functional.one_hot(torch.from_numpy(nearest), n_clusters).double()
        runs.append(fit_gaussian_mixture(x, resp, weight, reg_covar=reg_covar))
    best = runs[first_best([-float(run.lower_bound) for run in runs])].mixture
    within = torch.einsum("k,kij->ij", best.weights, best.covariances)
    return best.means + torch.from_numpy(origin), within
