r"""DCAN: deep clustering against a critic of the codes.

Lim, "Deep clustering using adversarial net based clustering loss", arXiv 2412.08933. An encoder
learns codes that a critic cannot tell from draws out of their own Gaussian, which brings them near
a mixture in the sense of the Jensen-Shannon divergence. Implemented: Eqs. 1 to 8 and 13 to 23, with
the closed forms (Kullback-Leibler, Euclidean) beside the game. Taken literally the method
collapses; the default is the reading that does not.
"""

from dataclasses import KW_ONLY
from numbers import Integral, Real
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from deepmix import parameters as p
from deepmix._torch import make_generator, own_modes, sum_batchwise, threads_for
from deepmix.autoencoder import AutoencoderMixture, decoded, reconstruction_unit
from deepmix.base import trains
from deepmix.fitting import Fit, RandomStreams, Trained
from deepmix.gaussian_mixture import COVARIANCE_TYPES, Mixture, draw_rows, log_joint
from deepmix.kmeans import canonical_order, first_best, k_means, plus_plus, sample_rows
from deepmix.losses import squared_error
from deepmix.mixture.dcan.adversarial import OBJECTIVES, Settings
from deepmix.mixture.dcan.mixture_search import covariance_type_for, search_mixture
from deepmix.mixture.dcan.network import DCANNetwork, component, hard_mixture
from deepmix.networks import check_layer_sizes, materialize, trainable
from deepmix.training import History

if TYPE_CHECKING:
    from typing_extensions import Self

# clustering_weight='auto' for each divergence. On MNIST, digits and Pendigits, with labels in
# sight, 'js' was best between 1 and 5. 'kl' shrinks the codes: at 0.6 to one cluster on
# 20 Newsgroups, at 0.1 on no data.
CLUSTERING_WEIGHTS = {"js": 3.0, "kl": 0.1, "euclidean": 1.0}
# max_iter='auto' makes STEPS steps of the game. pretrain_max_iter='auto' makes PRETRAIN_STEPS steps
# of the autoencoder alone, in a number of epochs within the limits PRETRAIN_EPOCHS.
STEPS, PRETRAIN_STEPS, PRETRAIN_EPOCHS = 1000, 2400, (15, 150)
BATCH = 128
# Lower limit of the unit of reconstruction errors, as a share of the data's variance: for a table
# that the autoencoder copies, reconstruction would otherwise outweigh all else.
LEAST_ERROR = 0.01
# Rows are scaled to this mean squared norm. One step of Adam moves a code in proportion to the norm
# of its row: one learning rate then means the same for tables and for images.
SQUARED_NORM = 10.0
# Rows are not centred if this share of their values is zero, since zero then means absent, unless
# their squared mean exceeds LONG_MEAN times the variance: then some columns lie far from zero.
MANY_ZEROS, LONG_MEAN = 0.25, 10.0
KMEANS_RESTARTS = 20
REG_COVAR = 1e-3  # of the codes' variance
# Components are started from CODES rows at most, the mixture of the final codes is fitted to
# FINAL_CODES at most; or to 100 rows for each cluster if that is more.
CODES, FINAL_CODES = 20_000, 200_000


class PaperSettings(NamedTuple):
    """What Sec. 3 says of a data set: hidden layers and width of the codes, critic."""

    hidden_layer_sizes: tuple
    latent_dim: int
    critic_hidden_layer_sizes: tuple


PAPER_SETTINGS = {
    "mnist": PaperSettings((384,), 256, (16,)),
    "reuters10k": PaperSettings((100,), 500, (100,)),
    "cifar10": PaperSettings((1024, 512), 128, (16,)),
}

# --- Estimator -------------------------------------------------------------------------


@p.parameters
class DCAN(AutoencoderMixture):
    """DCAN: an encoder against a critic that asks whether codes come from their cluster.

    An autoencoder is trained, then its encoder goes on: until a small network, the critic, cannot
    tell codes relative to their own cluster from Gaussian noise, while the decoder still rebuilds
    the data. Clusters are read from a Gaussian mixture of the codes, which is worth more than the
    game is: ``max_iter=0`` leaves the game out. Made for images.

    Parameters
    ----------
    n_clusters : int, default=10
        Number of clusters.
    divergence : {'js', 'kl', 'euclidean'}, default='js'
        What brings codes near their own component: the critic, which stands for the Jensen-Shannon
        divergence; or a closed form, the Kullback-Leibler divergence of two Gaussians or half the
        squared distance. Those are faster, and the mixture that training follows gains less by
        them on MNIST; that of the final codes gains as much.
    covariance_type : {'auto', 'full', 'tied', 'diag', 'spherical', 'tied_spherical', \
            'tracked'}, default='auto'
        Covariances of the mixture that is fitted to the final codes and makes the predictions.
        'tracked' takes the mixture that training follows, with one variance for all, as it is.
        'auto' is 'full' if codes have 16 dimensions at most and there are 15 rows for each
        dimension of each cluster, else 'tied'. It matters more than ``divergence``.
    hidden_layer_sizes : tuple of int, default=(384, 128)
        Layers of the encoder between data and codes; the decoder has them in reverse.
    latent_dim : int or None, default=None
        Dimension of the codes; None takes 10, or two thirds of ``n_clusters`` if that is more, but
        no more than there are features. Codes of as many dimensions as the data are a copy of them.
    clustering_weight : 'auto' or float, default='auto'
        Weight of the divergence beside the reconstruction (gamma). 'auto' is 3 for 'js', 0.1 for
        'kl' and 1 for 'euclidean'.
    warm_up : int, default=100
        Steps in which that weight grows from nothing. At first the critic knows nothing, and pushes
        codes at random: where clusters lie far apart, this can drive them further apart and lose
        some. Not in a fit that goes on from another.
    reconstruction_weight : float, default=1.0
        Weight of the decoder's error, in units of that after pretraining. With 0 the decoder is
        not trained further, as in the paper: nothing then keeps the codes from losing what tells
        the clusters apart.
    conditional : bool, default=True
        Whether the critic sees codes relative to their own component, in units of its deviation,
        or as they are. As they are it cannot ask which component a code belongs to, and the
        tracked mixture gains less.
    generator_loss : {'non_saturating', 'saturating'}, default='non_saturating'
        What the encoder minimises. The paper's 'saturating' loses clusters.
    assignment : {'posterior', 'literal'}, default='posterior'
        How codes get their component. The paper's Eq. 22, 'literal', lacks the variance: all codes
        end in one component. Codes then keep the scale that the encoder gives them.
    critic_hidden_layer_sizes : tuple of int, default=(64,)
        Hidden layers of the critic, or for 'kl' of the network that gives the deviations. The
        paper's 16 units of tanh collapse.
    activation : {'relu', 'tanh'}, default='relu'
        Activation of all networks; the critic's ReLU is leaky. The paper's 'tanh' bounds the codes
        too.
    spectral_norm : bool, default=False
        Whether the layers of the critic are divided by their spectral norms. No harm, no gain.
    label_smoothing : float, default=0.0
        Subtracted from the critic's target for draws. No harm, no gain.
    update_every : int, default=10
        Steps between two sweeps of EM for the mixture that training follows; 0 keeps the mixture
        as at the start, which is an adversarial autoencoder with that prior.
    pool_size : int, default=1000
        Rows whose codes such a sweep looks at.
    memory : float, default=0.5
        Share that the mixture keeps of its values at a sweep.
    init : {'k-means', 'k-means++'}, default='k-means'
        Where the components start, among the pretrained codes.
    n_init : int, default=1
        Restarts, one after another: that whose components are tightest, relative to the codes'
        variance, is kept. No label-free criterion proved reliable.
    readout_n_init : int, default=20
        Starts of the mixture of the final codes, the tracked one beside them; a search by cuts and
        merges follows (`deepmix.mixture.dcan.mixture_search.search_mixture`).
    equal_weights : bool, default=True
        Whether the clusters of that mixture, and of the one that training follows, have weight
        1/K. On codes free weights let one cluster grow at the cost of another: the likeliest
        mixture is then a worse one, on MNIST by a tenth of accuracy, and where there are no
        clusters to be seen one component takes nearly all. Set it to False, which is the paper's
        Eq. 23, where clusters differ in size by far.
    encoder, decoder : callable, torch.nn.Module or None, default=None
        Networks to use instead of ``hidden_layer_sizes``: a callable ``(n_in, n_out) ->
        nn.Module``, or a module, which is copied with its weights and never trained in place.
        ``nn.Dropout`` in them draws from the fit's generator; other random layers, and dropout that
        is called as a function, draw from torch's global one.
    pretrain_max_iter : int or 'auto', default='auto'
        Epochs of the autoencoder alone, at most; 'auto' makes 2400 steps of them, but no fewer
        than 15 epochs and no more than 150. Without any the game starts from random codes, and
        fails.
    max_iter : int or 'auto', default='auto'
        Epochs of the game, at most; 'auto' makes 1000 steps of them.
    batch_size : int or 'auto', default='auto'
        Rows in a step, twice as many in pretraining; 'auto' is 128. The paper's 16 is slower and
        loses accuracy.
    learning_rate_init : float, default=0.001
        Step size.
    solver : {'adam', 'sgd'}, default='adam'
        Optimiser; pretraining always has Adam. The paper's 'sgd' loses accuracy.
    momentum : float, default=0.5
        Momentum of the optimiser in the game: Adam's first decay rate, or the momentum of 'sgd'.
    scale : bool, default=True
        Whether rows are centred and divided by one number that makes their mean squared norm 10.
        They are not centred if a quarter of the values are zero, as in images and counts, where
        zero means absent, unless columns lie far from zero. Decoded centres and reconstructions are
        in the units of X.
    precision : {'float32', 'bfloat16'}, default='float32'
        Number format of the autoencoder's matrix products in training; 'bfloat16' is faster where
        the hardware has it. The losses stay float32.
    tol : float, default=0.0
        An epoch counts as improvement if it lowers the encoder's loss by this fraction. 0 trains
        for ``max_iter`` epochs: the losses of a game say little about its end.
    n_iter_no_change : int, default=10
        Epochs without improvement that end a stage.
    warm_start : bool, default=False
        Whether `fit` goes on from the last solution, without pretraining.
    device : str or torch.device, default='auto'
        Where to compute.
    dtype : {'float32', 'float64', 'auto'}, default='float32'
        Number format of training; 'auto' is that of X. Predictions are made in the dtype of X.
    random_state : int, RandomState instance or None, default=None
        Determines initial weights, draws and the order of rows.
    verbose : int, default=0
        Print a line every ten epochs (1) or every epoch (10).

    Attributes
    ----------
    labels_ : ndarray of shape (n_samples,)
        Cluster of each training row.
    weights_ : ndarray of shape (n_clusters,)
        Weights of the mixture of the codes.
    means_ : ndarray of shape (n_clusters, latent_dim)
        Means of the mixture, among the codes; also ``latent_centers_``.
    covariances_ : ndarray
        Covariances of the mixture, of shape (n_clusters, latent_dim, latent_dim),
        (latent_dim, latent_dim), (n_clusters, latent_dim), (n_clusters,) or (), as
        ``covariance_type_`` says.
    covariance_type_ : str
        What 'auto' has chosen; 'tied_spherical' for 'tracked'.
    cluster_centers_ : ndarray of shape (n_clusters, n_features)
        Decoded means, in the units of X.
    tracked_weights_, tracked_means_, tracked_variance_ : ndarray
        Weights, means and variance of the mixture that training followed.
    n_clusters_ : int
        Number of clusters.
    history_ : dict of str to ndarray of shape (`n_iter_`,)
        'loss' and its terms 'clustering' and 'reconstruction' (one without the game), per row;
        'latent_variance', one at the start; of the critic 'critic', its loss (2 ln 2 if it can
        tell nothing), and 'critic_accuracy'; and 'pretrain_reconstruction', of its own length.
    n_iter_ : int
        Epochs of the game.
    converged_ : bool
        Whether ``tol`` ended it.
    device_ : str
        Where it was trained.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, where X has strings for column names.

    See Also
    --------
    AECM : An autoencoder with a clustering module.
    deepmix.pretrain_autoencoder : One autoencoder for several estimators.
    sklearn.mixture.GaussianMixture : Without a network.

    References
    ----------
    .. [1] K.-L. Lim, "Deep clustering using adversarial net based clustering loss",
       arXiv 2412.08933, 2024.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from deepmix import DCAN
    >>> X = load_iris().data
    >>> model = DCAN(3, hidden_layer_sizes=(32,), pretrain_max_iter=20, max_iter=20, random_state=0)
    >>> model.fit(X).means_.shape
    (3, 4)
    >>> model.cluster_centers_.shape
    (3, 4)
    """

    n_clusters: p.Count = 10
    _: KW_ONLY
    divergence: Literal["js", "kl", "euclidean"] = "js"
    covariance_type: Annotated[str, p.StrOptions({"auto", "tracked", *COVARIANCE_TYPES})] = "auto"
    hidden_layer_sizes: p.Layers = (384, 128)
    latent_dim: p.Count | None = None
    clustering_weight: p.NonNegative | p.Auto = "auto"
    warm_up: p.CountOrZero = 100
    reconstruction_weight: p.NonNegative = 1.0
    conditional: bool = True
    generator_loss: Literal["non_saturating", "saturating"] = "non_saturating"
    assignment: Literal["posterior", "literal"] = "posterior"
    critic_hidden_layer_sizes: p.Layers = (64,)
    activation: Literal["relu", "tanh"] = "relu"
    spectral_norm: bool = False
    label_smoothing: Annotated[float, p.Interval(Real, 0, 0.5, closed="left")] = 0.0
    update_every: p.CountOrZero = 10
    pool_size: Annotated[int, p.Interval(Integral, 2, None, closed="left")] = 1000
    memory: p.Share = 0.5
    init: Literal["k-means", "k-means++"] = "k-means"
    n_init: p.Count = 1
    readout_n_init: p.Count = 20
    equal_weights: bool = True
    encoder: p.Coder | None = None
    decoder: p.Coder | None = None
    pretrain_max_iter: p.CountOrZero | p.Auto = "auto"
    max_iter: p.CountOrZero | p.Auto = "auto"
    batch_size: p.Count | p.Auto = "auto"
    learning_rate_init: p.Positive = 1e-3
    solver: p.Solver = "adam"
    momentum: p.Share = 0.5
    scale: bool = True
    precision: p.Precision = "float32"
    tol: p.NonNegative = 0.0
    n_iter_no_change: p.Count = 10
    warm_start: bool = False
    device: p.Device = "auto"
    dtype: p.Dtype = "float32"
    random_state: p.RandomState = None
    verbose: p.Verbosity = 0

    _network_class = DCANNetwork
    _transform_output = "encode"

    @classmethod
    def from_paper(cls, dataset: str, n_clusters: int = 10, **parameters: Any) -> "Self":
        """Make an estimator that takes the paper at its word (Sec. 3 and Appendix A).

        Networks of tanh units and no decoder; no pretraining; a critic of codes as they are, with
        the saturating loss and Eq. 22; gradient descent with momentum in batches of 16. It
        collapses: :doc:`/methods/dcan` says why, and the default is what works.

        Parameters
        ----------
        dataset : {'mnist', 'reuters10k', 'cifar10'}
            Whose networks to take.
        n_clusters : int, default=10
        **parameters
            Override any of these settings.

        Returns
        -------
        estimator : DCAN
        """
        if dataset not in PAPER_SETTINGS:
            raise ValueError(
                f"The paper lists no networks for {dataset!r}. Choose one of "
                f"{sorted(PAPER_SETTINGS)}."
            )
        settings = {
            **PAPER_SETTINGS[dataset]._asdict(),
            "covariance_type": "tracked",
            "clustering_weight": 1.0,
            "warm_up": 0,
            "reconstruction_weight": 0.0,
            "conditional": False,
            "generator_loss": "saturating",
            "assignment": "literal",
            "equal_weights": False,
            "activation": "tanh",
            "memory": 0.0,
            "update_every": 1,
            "pool_size": 600,
            "pretrain_max_iter": 0,
            "max_iter": 1,
            "batch_size": 16,
            "solver": "sgd",
            "momentum": 0.9,
            "learning_rate_init": 1e-3 / 16,  # of sums over a batch; 1e-3 of means in the paper
            "scale": False,
        }
        return cls(n_clusters, **{**settings, **parameters})

    @trains
    def read_out(self, X: p.Matrix, sample_weight: p.ArrayLike | None = None) -> "Self":
        """Fit the mixture of the codes anew, and nothing else.

        With ``covariance_type``, ``equal_weights`` and ``readout_n_init`` as they are now, on the
        codes of X: to try another mixture on a network that is trained. The network, and with it
        the number of clusters, stays what it was in `fit`. ``labels_`` are those of X then.

        Parameters
        ----------
        X : {array-like, sparse matrix, torch.Tensor} of shape (n_samples, n_features)
        sample_weight : array-like of shape (n_samples,), default=None
            How often each row counts.

        Returns
        -------
        self : object
        """
        check_is_fitted(self)
        with self._whole_or_not_at_all():
            X, weight = self._check_training_data(X, sample_weight, reset=False)
            rows = self._training_rows(X, weight, self._prediction_device())
            with threads_for(self._step_work(rows)):
                network = self._rebuild(rows.dtype, rows.device)
                fit = Fit(rows, X, RandomStreams(self.random_state))
                fit = fit.through(network)
                readout = self._read_out(fit, network)
                fitted = {**self._fitted_attributes(fit, network), **readout}
                # As they were trained, whatever the parameters are now.
                fitted |= {"_arguments": self._arguments, "n_clusters_": self.n_clusters_}
                fitted["labels_"] = self._labels(X, fitted["_state"], self._arguments)
            self._set_fitted(fitted)
        return self

    @property
    def latent_centers_(self) -> np.ndarray:
        """Means of the mixture: ``means_``."""
        return self.means_

    def score_samples(self, X: p.Matrix) -> np.ndarray:
        """Log-density of the code of each row under the mixture.

        Codes have variance one, yet the number cannot compare two fits: another encoder lays out
        other codes. It tells rows of one fit apart.

        Parameters
        ----------
        X : {array-like, sparse matrix, torch.Tensor} of shape (n_samples, n_features)

        Returns
        -------
        log_density : ndarray of shape (n_samples,)
            In nats, for codes.
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
        return self.inverse_transform(draw_rows(self._mixture(), labels, noise)), labels

    # --- Hooks of the base class -----------------------------------------------------

    def _latent_dim(self, n_features):
        return self.latent_dim or min(n_features, max(10, 2 * self.n_clusters // 3))

    def _network_arguments(self, n_features):
        return {
            **super()._network_arguments(n_features),
            "divergence": self.divergence,
            "conditional": self.conditional,
            "critic_hidden_layer_sizes": tuple(self.critic_hidden_layer_sizes),
            "activation": self.activation,
            "spectral_norm": self.spectral_norm,
        }

    def _check_parameters(self):
        super()._check_parameters()
        check_layer_sizes(self.critic_hidden_layer_sizes, "critic_hidden_layer_sizes")

    def _init_network(self, fit, n_restarts):
        network = super()._init_network(fit, n_restarts)
        for name in ("critic", "deviation"):
            if getattr(network, name) is not None:
                # With biases of zero a code on its mean would lie on the kink of every ReLU.
                part = materialize(getattr(network, name), fit.rng.torch, "fan-in")
                setattr(network, name, part)
        return network

    def _fit_scaler(self, scaler, rows):
        center, squares = rows.moments()  # squared differences from the centre
        short = center.square().sum() <= LONG_MEAN * squares.sum()
        if short and rows.zero_share() >= MANY_ZEROS:
            center, squares = torch.zeros_like(center), squares + center.square()
        scaler.fit(center, squares * len(squares) / SQUARED_NORM)

    # --- Training --------------------------------------------------------------------

    def _train(self, fit, network):
        before = self._pretrain(fit, network, **self._pretraining(fit.rows))
        if not fit.continues:
            self._start(fit, network.eval())
            network.train()
        history = History(interrupted=before.interrupted)
        if not before.interrupted and trainable(network.autoencoder.encoder):
            settings = self._settings(fit.rows, fit.continues)
            history = self._minimize(
                fit,
                network,
                OBJECTIVES[self.divergence](network, fit.rows, settings, fit.rng.torch),
                max_iter=self._n_epochs(fit.rows),
                solver=self.solver,
                momentum=self.momentum,
            )
        criterion = within_components(network.eval(), fit.rows)
        return Trained(network, history.after(before), criterion)

    def _batch_size(self, rows):
        return BATCH if self.batch_size == "auto" else int(self.batch_size)

    def _n_epochs(self, rows):
        if self.max_iter != "auto":
            return self.max_iter
        return -(-STEPS // len(rows.batch_sizes(self._batch_size(rows))))

    def _settings(self, rows, continues=False):
        weight = self.clustering_weight
        return Settings(
            clustering_weight=CLUSTERING_WEIGHTS[self.divergence] if weight == "auto" else weight,
            warm_up=0 if continues else self.warm_up,
            reconstruction_weight=self.reconstruction_weight,
            update_every=self.update_every,
            pool_size=self.pool_size,
            memory=self.memory,
            literal=self.assignment == "literal",
            equal_weights=self.equal_weights,
            saturating=self.generator_loss == "saturating",
            label_smoothing=self.label_smoothing,
            batch_size=self._batch_size(rows),
        )

    def _pretraining(self, rows):
        """Batches twice as large as later, and epochs enough for `PRETRAIN_STEPS`."""
        batch_size, n_epochs = 2 * self._batch_size(rows), self.pretrain_max_iter
        if n_epochs == "auto":
            n_steps = len(rows.batch_sizes(batch_size))
            n_epochs = int(np.clip(-(-PRETRAIN_STEPS // n_steps), *PRETRAIN_EPOCHS))
        return {"batch_size": batch_size, "max_iter": n_epochs}

    def _start(self, fit, network):
        """Units of codes and losses, and components by k-means."""
        rows, random_state = fit.rows, fit.rng.numpy
        self._normalize(network, rows)
        network.error_unit.fill_(reconstruction_unit(network, rows, LEAST_ERROR))
        sample = sample_rows(rows, network.encode, self.n_clusters, random_state, CODES)
        # In a fixed order k-means++ draws the same whatever the order of the rows.
        codes, weight = canonical_order(*sample)
        z = torch.from_numpy(codes).double()
        weight = torch.ones_like(z[:, 0]) if weight is None else torch.from_numpy(weight)
        mixture = self._first_mixture(z, weight, make_generator(random_state))
        labels = log_joint(z, mixture).argmax(dim=1)
        network.track(hard_mixture(z, labels, weight, mixture, self.equal_weights))
        network.variance_unit.copy_(network.tracked_variance)

    def _first_mixture(self, z, weight, generator):
        """Components by k-means, the best of several, or by k-means++."""
        several = self.init == "k-means"
        n_init = KMEANS_RESTARTS if several else 1
        centers = plus_plus(z, self.n_clusters, generator, weight, n_init)
        fit = k_means(z, centers, weight, max_iter=100 if several else 0)
        return fit.take(first_best(-fit.lower_bound)).mixture

    def _normalize(self, network, rows):
        """Give codes mean zero and variance one, unless their scale is to mean something."""
        if self.assignment == "literal":
            return

        def sums(batch, weight):
            z = network.encode(batch).double()
            return (weight.double() @ torch.cat([z, z.square()], dim=1)).cpu()

        first, second = (sum_batchwise(sums, rows) / rows.total_weight).chunk(2)
        network.normalize(first, float((second - first.square()).mean()))

    # --- The mixture of the final codes ----------------------------------------------

    def _finish(self, fit, trained):
        network = trained.network
        if trained.history.n_iter or not fit.continues:
            self._normalize(network, fit.rows)
            trained.attributes |= self._read_out(fit, network)
        else:  # nothing has changed
            trained.attributes |= readout_attributes(self._mixture())

    def _read_out(self, fit, network):
        """Fit the mixture that predictions are made from: dict of fitted attributes."""
        rows, rng = fit.rows, fit.rng.child("read-out")
        mixture = network.tracked.map(torch.Tensor.double)
        n_clusters = len(mixture.weights)
        sample = sample_rows(rows, network.encode, n_clusters, rng.numpy, FINAL_CODES)
        codes, weight = canonical_order(*sample)
        z = torch.from_numpy(codes).to(rows.device)
        weight = None if weight is None else torch.from_numpy(weight).to(z.device)
        own = component(z, network.tracked, self.assignment == "literal")
        counts = torch.bincount(own, minlength=n_clusters)
        if self.covariance_type != "tracked":
            found = search_mixture(
                z.double(),
                n_clusters,
                rng.torch,
                weight,
                starts=[mixture],
                covariance_type=self._readout_type(rows.total_weight, n_clusters, z.shape[1]),
                equal_weights=self.equal_weights,
                reg_covar=REG_COVAR,
                n_init=self.readout_n_init,
            )
            # Rounding chooses between two restarts that end in one mixture: sort its clusters.
            mixture = found.mixture.in_order()
        network.mixture.set(mixture)
        return {"_n_lost": int((counts == 0).sum()), **readout_attributes(mixture)}

    def _readout_type(self, n_rows, n_clusters, n_dimensions):
        if self.covariance_type != "auto":
            return self.covariance_type
        return covariance_type_for(n_rows, n_clusters, n_dimensions)

    def _mixture(self):
        """The fitted mixture on tensors."""
        arrays = (self.weights_, self.means_, self.covariances_)
        return Mixture(*map(torch.tensor, arrays), self.covariance_type_)

    def _attributes_midway(self, fit, network):
        mixture = network.tracked.map(torch.Tensor.double)
        network.mixture.set(mixture)
        return {**super()._attributes_midway(fit, network), **readout_attributes(mixture)}

    def _fitted_attributes(self, fit, network, restart=0):
        attributes = super()._fitted_attributes(fit, network, restart)
        names = ("tracked_weights_", "tracked_means_", "tracked_variance_")
        values = (value.double().cpu().numpy().copy() for value in network.tracked.tensors)
        tracked = dict(zip(names, values, strict=True))
        centers = decoded(network, network.mixture.means)
        return {**attributes, **tracked, "cluster_centers_": centers}

    def _concerns(self, fit, trained):
        yield from super()._concerns(fit, trained)
        # If predictions have lost clusters too, the base class has warned of it.
        if self._n_lost and len(np.unique(self.labels_)) == self.n_clusters_:
            yield (
                f"{self._n_lost} of {self.n_clusters} components of the mixture that training "
                "followed have lost all their rows. Raise warm_up, lower clustering_weight or "
                "learning_rate_init, or raise reconstruction_weight."
            )


def readout_attributes(mixture):
    """Fitted attributes of the mixture that predictions are made from: dict."""
    return {**mixture.attributes(), "covariance_type_": mixture.covariance_type}


def within_components(network, rows):
    """Share of the codes' variance that lies within the components of the tracked mixture."""

    def sums(batch, weight):
        z, tracked = network.encode(batch), network.tracked
        near = squared_error(z, tracked.means[component(z, tracked)], weight)
        return torch.cat([near[None], weight @ z, (weight @ z.square()).sum()[None]]).cpu()

    near, *first, second = sum_batchwise(sums, rows).double() / rows.total_weight
    total = second - torch.stack(first).square().sum()
    return float(near / total.clamp_min(torch.finfo(rows.dtype).eps))
