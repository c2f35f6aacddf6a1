r"""Neural mixture EM: a network whose outputs are the densities of the clusters.

Tissera et al., "Neural Mixture Models with Expectation-Maximization for End-to-end Deep
Clustering", Neurocomputing 505 (2022). Each output of a network scores the relevance of a row to
one cluster; standardised over the batch and put through the linear part of a sigmoid, a score acts
as a density whose integral all clusters share, so that none can take all rows. Each step of
training is a step of EM, for images on two views of each, and in two-fold training one for
consistency besides. No k-means anywhere.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import KW_ONLY
from functools import partial
from numbers import Integral, Real
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import one_hot

from deepmix import parameters as p
from deepmix._torch import inference_batch_size, sum_batchwise
from deepmix.augmentation import (
    IMAGE_AUGMENTATIONS,
    VECTOR_AUGMENTATIONS,
    ImageAugmentation,
    VectorAugmentation,
)
from deepmix.base import BaseDeepMixture
from deepmix.fitting import Trained
from deepmix.kmeans import first_best
from deepmix.mixture.neural_mixture_em.network import NeuralMixtureNetwork
from deepmix.mixture.neural_mixture_em.training import (
    Gaps,
    MixtureEM,
    contingencies,
    finite_members,
    impose_weights,
    n_pieces,
)
from deepmix.networks import check_layer_sizes
from deepmix.partitions import align, stability
from deepmix.training import History

if TYPE_CHECKING:
    from typing_extensions import Self

BATCH_SIZE = 128  # rows in a step by default, as in the paper
# With max_iter='auto' training lasts at least so many epochs and at least so many steps.
MIN_EPOCHS, MIN_STEPS = 10, 1000
# Restarts with n_init='auto', of the perceptron and of other networks.
DEFAULT_RESTARTS, DEFAULT_RACERS = 10, 4
RACE = 0.3  # share of the epochs for which all restarts of a large network are trained
# Step sizes with learning_rate_init='auto', for vectors and for images.
LEARNING_RATE, IMAGE_LEARNING_RATE = 1e-3, 2e-4
CONSISTENCY_SHARE = 0.2  # default of consistency_learning_rate, over learning_rate_init
LEAST_GAMMA = 1e-12  # smallest gamma: scores divided by less would overflow
LOST_CONFIDENCE = 0.8  # a fit warns if its confidence falls below this share of its maximum
# With weights='learned', a restart may be kept if its cut is at most SIMILAR_CUT times the least,
# and unequal clusters are kept if their cut is below CLEARER_CUT times that of equal ones.
SIMILAR_CUT, CLEARER_CUT = 1.5, 0.5

# Network of Table 2 and shape of the images of each data set, Sec. 8.2.
PAPER_IMAGES = {
    "mnist": ("mnist", (1, 28, 28)),
    "cifar10": ("cifar", (3, 32, 32)),
    "cifar100": ("cifar", (3, 32, 32)),
    "stl10": ("stl10", (3, 96, 96)),
}

# --- Estimator -------------------------------------------------------------------------


@p.parameters
class NeuralMixtureEM(BaseDeepMixture):
    """Mixture whose densities are the outputs of a network, trained by EM in mini-batches.

    For vectors it finds clumps of any shape, without centres and without k-means; with
    ``image_shape`` it clusters raw images end to end, by random views of them. All clusters are
    pulled to equal size unless ``weights`` says otherwise, and `predict_proba` is under-confident
    by construction: with ten balanced clusters the largest posterior is about three quarters.
    `transform` gives the standardised relevance scores of the clusters, of which `predict_proba`
    is the softmax (with ``ensemble``, both are means over its networks).

    Parameters
    ----------
    n_clusters : int, default=8
        Number of clusters.
    hidden_layer_sizes : tuple of int, default=(32, 32)
        Hidden layers of the perceptron for vectors.
    image_shape : tuple (channels, height, width) or None, default=None
        How a row of X is unfolded to an image, of one channel or of three (red, green, blue).
        None clusters vectors.
    network : str, callable, torch.nn.Module or None, default=None
        Network to use instead. For images 'mnist', 'cifar' or 'stl10' (Table 2), or its layers
        as text, such as 'C32 M C64 F32': 3x3 convolutions, 2x2 max-pooling, dense. A callable
        ``(shape, n_out) -> nn.Module`` is built anew in each fit; ``shape`` is the number of
        features, or (channels, height, width) of what the network sees. A module is copied with
        its weights. None takes 'mnist' for images of one channel and 'cifar' for three.
    sobel : bool, default=True
        Whether the network sees the vertical and horizontal edges of the gray image (2 channels)
        instead of the image.
    augmentation : str, callable or None, default='auto'
        Random views, with which training goes by Eq. 7; None trains by Eq. 6. For images 'weak',
        'medium', 'strong', and 'natural' with flips and crops for photographs; for vectors
        'noise', 'masking', or 'mixup' with the nearest row of the batch; or strengths of your own
        as `deepmix.augmentation.ImageAugmentation` or `VectorAugmentation`. Any other callable
        maps a batch of images (B, channels, height, width) in [0, 1], or of standardised rows, to
        one of the same shape. 'auto' is 'medium' for gray images, 'natural' for colour, None for
        vectors.
    two_fold : bool, default=False
        Whether each step of EM is followed by one for consistency between rows and views (Eq. 8,
        Algorithm 1).
    consistency_learning_rate : float or None, default=None
        Step size for consistency. None takes a fifth of ``learning_rate_init``. A rate above that
        of EM drives small nets to uniform posteriors, which are a trivial optimum of Eq. 8.
    consistency_warm_up : int, default=0
        Epochs at the beginning without steps for consistency.
    weights : {'uniform', 'learned'} or array-like of shape (n_clusters,), default='uniform'
        Prior p(z) of the clusters. 'uniform' is the paper's and pulls all clusters to equal size.
        'learned' trains five times as many outputs, joins those between which there is no gap in
        the data, and keeps the result if its gaps are clearer than those between equal clusters;
        it costs about three times as much. Given shares rank the clusters found so by size, and
        weigh their posteriors. The gaps are looked for among at most 4000 rows, each counted once
        whatever its weight. With fewer than five restarts it is less sure.
    gamma : float, default=5.0
        Divisor of the scores in the sigmoid; 2 to 10 make no difference, 1 fails.
    n_init : int or 'auto', default='auto'
        Restarts. Those of the perceptron are trained side by side, 'auto' is 10, which costs two or
        three times as much as one. Other networks race: the first three tenths of the epochs
        train all restarts, the rest the one of lowest loss; 'auto' is 4.
    selection : {'stability', 'loss'}, default='stability'
        Which restart of the perceptron is kept: the one whose clusters agree best with those of the
        others (mean NMI), or that of lowest loss. Where outputs are joined (``weights``), the most
        stable of those with the clearest gaps is.
    ensemble : bool, default=False
        Whether all restarts, trained to the end, are kept and their posteriors averaged, clusters
        matched to those of the one selected.
    max_iter : int or 'auto', default='auto'
        Epochs; 'auto' is ten, or as many as make a thousand steps.
    batch_size : int or 'auto', default='auto'
        Rows in a step, made even over an epoch; 'auto' is 128, and all rows where there are fewer
        than 256. Statistics of small batches do harm.
    learning_rate_init : float or 'auto', default='auto'
        Step size of Adam; 'auto' is 1e-3 for vectors, as in the paper, and 2e-4 for images, where
        larger steps end in poorer optima.
    weight_decay : float, default=0.001
        Weight decay of Adam: factor of the weights in the gradient of the mean loss.
    scale : bool, default=True
        Whether features are standardised, and pixels mapped to 0 to 1 by the limits of the
        training data. Without it pixels must lie there already.
    precision : {'float32', 'bfloat16'}, default='float32'
        Precision of the network's products in training; 'bfloat16' is faster where the hardware
        has it. The loss stays float32.
    tol : float, default=0.0
        An epoch counts as improvement if it lowers the loss by this fraction. 0 trains for
        ``max_iter`` epochs.
    n_iter_no_change : int, default=10
        Epochs without improvement that end training.
    warm_start : bool, default=False
        Whether `fit` goes on from the last solution.
    device : str or torch.device, default='auto'
        Where to compute.
    dtype : {'float32', 'float64', 'auto'}, default='float32'
        Floating-point type of training; 'auto' is that of X. Predictions have the dtype of X.
    random_state : int, RandomState instance or None, default=None
        Determines initial weights, the order of rows, and views but for those of a callable.
    verbose : int, default=0
        Print a line every ten epochs (1) or every epoch (10).

    Attributes
    ----------
    labels_ : ndarray of shape (n_samples,)
        Cluster of each training row.
    cluster_centers_ : ndarray of shape (n_clusters, n_features)
        Mean of the training rows in each cluster, to look at: the model has no centres. An empty
        cluster has the mean of all rows.
    weights_ : ndarray of shape (n_clusters,)
        Prior of the clusters; with 'learned' the shares of the training rows, unless equal
        clusters were kept.
    n_clusters_ : int
        Number of clusters.
    history_ : dict of str to ndarray of shape (`n_iter_`,)
        'loss' and its terms 'em' and 'em_view' (the two of Eq. 7), per row; 'confidence', the mean
        of the largest posteriors; and 'consistency' (Eq. 8), without the epochs of the warm-up.
        Where outputs were joined, the curves are those of all outputs.
    n_iter_ : int
        Epochs run.
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
    ClusteringModule : Round clusters, by mini-batches.
    AECM : Clusters around decoded centres.

    References
    ----------
    .. [1] D. Tissera, K. Vithanage, R. Wijesinghe, A. Xavier, S. Jayasena, S. Fernando, R. Rodrigo,
       "Neural Mixture Models with Expectation-Maximization for End-to-end Deep Clustering",
       Neurocomputing 505, 249-262, 2022.

    Examples
    --------
    >>> from sklearn.datasets import make_blobs
    >>> from deepmix import NeuralMixtureEM
    >>> X, y = make_blobs(n_samples=300, centers=3, random_state=0, cluster_std=0.5)
    >>> model = NeuralMixtureEM(n_clusters=3, max_iter=100, random_state=0).fit(X)
    >>> model.predict_proba(X[:2]).shape
    (2, 3)

    Images are rows, too:

    >>> from sklearn.datasets import load_digits
    >>> images = load_digits().data
    >>> model = NeuralMixtureEM(
    ...     n_clusters=10, image_shape=(1, 8, 8), network="C8 M C16 F16", max_iter=2, random_state=0
    ... )
    >>> model.fit_predict(images).shape
    (1797,)
    """

    n_clusters: p.Count = 8
    _: KW_ONLY
    hidden_layer_sizes: p.Layers = (32, 32)
    image_shape: tuple[int, ...] | list[int] | None = None
    network: str | p.Coder | None = None
    sobel: bool = True
    augmentation: str | Callable | None = "auto"
    two_fold: bool = False
    consistency_learning_rate: p.Positive | None = None
    consistency_warm_up: p.CountOrZero = 0
    weights: Literal["uniform", "learned"] | p.ArrayLike = "uniform"
    gamma: Annotated[float, p.Interval(Real, LEAST_GAMMA, None, closed="left")] = 5.0
    n_init: p.Count | p.Auto = "auto"
    selection: Literal["stability", "loss"] = "stability"
    ensemble: bool = False
    max_iter: p.CountOrZero | p.Auto = "auto"
    batch_size: p.Count | p.Auto = "auto"
    learning_rate_init: p.Positive | p.Auto = "auto"
    weight_decay: p.NonNegative = 1e-3
    scale: bool = True
    precision: p.Precision = "float32"
    tol: p.NonNegative = 0.0
    n_iter_no_change: p.Count = 10
    warm_start: bool = False
    device: p.Device = "auto"
    dtype: p.Dtype = "float32"
    random_state: p.RandomState = None
    verbose: p.Verbosity = 0

    _network_class = NeuralMixtureNetwork
    _batched_restarts = True
    _transform_output = "relevance"

    @classmethod
    def from_paper(cls, dataset: str, n_clusters: int | None = None, **parameters: Any) -> "Self":
        """Make an estimator with the settings of the paper (Secs. 8.1 and 8.2).

        One run of Adam without weight decay in batches of 128. Vectors: ten epochs at 1e-3, by
        Eq. 6, not scaled. Images: the network of Table 2, 250 epochs of two-fold training at 5e-5
        and 1e-4; ``two_fold=False`` is the row "EM optimization (Eq. 7)" of Table 3.

        Parameters
        ----------
        dataset : {'mnist_2d', 'mnist', 'cifar10', 'cifar100', 'stl10'}
            Data set whose network and shape of images are taken.
        n_clusters : int or None, default=None
            None takes the paper's: 20 (super-classes) for 'cifar100', else 10.
        **parameters
            Override any of these settings.

        Returns
        -------
        estimator : NeuralMixtureEM
        """
        if dataset not in PAPER_IMAGES and dataset != "mnist_2d":
            raise ValueError(
                f"The paper has no experiment on {dataset!r}. Choose one of "
                f"{['mnist_2d', *PAPER_IMAGES]}."
            )
        settings: dict[str, Any] = {"n_init": 1, "weight_decay": 0.0, "batch_size": 128}
        if dataset == "mnist_2d":
            settings |= {"max_iter": 10, "scale": False}
        else:
            network, image_shape = PAPER_IMAGES[dataset]
            settings |= {
                "network": network,
                "image_shape": image_shape,
                "augmentation": "medium" if image_shape[0] == 1 else "natural",
                "two_fold": True,
                "learning_rate_init": 5e-5,
                "consistency_learning_rate": 1e-4,
                "max_iter": 250,
            }
        n_clusters = n_clusters or (20 if dataset == "cifar100" else 10)
        return cls(n_clusters, **{**settings, **parameters})

    def score_samples(self, X: p.Matrix) -> np.ndarray:
        r"""Expected log-density of each row under its own posteriors: minus its loss (Eq. 6).

        .. math:: \sum_j p_{ij} \log \operatorname{sigmoid}(a^*_{ij} / \gamma)

        It orders the rows of one model by confidence. It is no density in data space: models of
        different ``n_clusters``, ``weights`` or data do not compare by it (with more outputs than
        clusters it is that of the outputs), and an outlier may score high.

        Parameters
        ----------
        X : {array-like, sparse matrix, torch.Tensor} of shape (n_samples, n_features)

        Returns
        -------
        scores : ndarray of shape (n_samples,)
            At most zero.
        """
        return self._apply("em_score", self._check_data(X))

    # --- Hooks of the base class: parameters and data ----------------------------------

    @property
    def _n_features_out(self):
        return self.n_clusters_

    def _n_restarts(self, fit):
        return 1 if fit.continues else self._n_starts()

    def _n_starts(self):
        if self.n_init != "auto":
            return self.n_init
        if isinstance(self.network, nn.Module):
            return 1
        return DEFAULT_RESTARTS if self._is_perceptron() else DEFAULT_RACERS

    def _has_equal_clusters(self):
        return isinstance(self.weights, str) and self.weights == "uniform"

    def _is_perceptron(self):
        return self.image_shape is None and self.network is None

    def _batch_size(self, rows):
        if self.batch_size != "auto":
            return int(self.batch_size)
        n_rows = len(rows.visited)
        return BATCH_SIZE if n_rows >= 2 * BATCH_SIZE else n_rows

    def _n_batches(self, rows):
        return len(rows.batch_sizes(self._batch_size(rows), even=True))

    def _n_epochs(self, rows):
        """Epochs: ``max_iter``, or for 'auto' enough for `MIN_EPOCHS` and `MIN_STEPS`: int."""
        if self.max_iter != "auto":
            return self.max_iter
        return max(MIN_EPOCHS, math.ceil(MIN_STEPS / self._n_batches(rows)))

    def _network_arguments(self, n_features):
        return {
            "n_features": n_features,
            "n_clusters": self.n_clusters,
            "hidden_layer_sizes": tuple(self.hidden_layer_sizes),
            "network": self.network,
            "image_shape": None if self.image_shape is None else tuple(self.image_shape),
            "sobel": self.sobel,
            "gamma": float(self.gamma),
            "n_members": self._n_starts() if self.ensemble else 1,
        }

    def _check_parameters(self):
        super()._check_parameters()
        self._check_network()
        self._check_augmentation()
        self._check_weights()
        if self.two_fold and self._augmentation() is None:
            raise ValueError(
                "two_fold=True compares rows with views of them, and augmentation="
                f"{self.augmentation!r} makes none. Name an augmentation, or set two_fold=False."
            )
        n_epochs = math.inf if self.max_iter == "auto" else self.max_iter
        if self.two_fold and 0 < n_epochs <= self.consistency_warm_up:
            raise ValueError(
                f"consistency_warm_up={self.consistency_warm_up} leaves none of max_iter="
                f"{self.max_iter} epochs for two_fold=True. Lower it, or raise max_iter."
            )

    def _check_network(self):
        check_layer_sizes(self.hidden_layer_sizes)
        if isinstance(self.network, nn.Module) and self._n_starts() > 1:
            raise ValueError(
                f"n_init={self.n_init} restarts of one torch.nn.Module, whose weights are kept, "
                "would be one model. Set n_init=1, or pass a callable that builds the network."
            )
        if isinstance(self.network, nn.Module) and not self._has_equal_clusters():
            raise ValueError(
                f"weights={self.weights!r} trains a network of more outputs than clusters, which a "
                "torch.nn.Module cannot become. Pass a callable (shape, n_out) -> nn.Module."
            )
        shape = self.image_shape
        if shape is None and isinstance(self.network, str):
            raise ValueError(
                f"network={self.network!r} is one for images; got image_shape=None. Set image_shape"
                "=(channels, height, width), or hidden_layer_sizes for vectors."
            )
        if shape is not None and (
            len(shape) != 3
            or not all(isinstance(side, Integral) and side >= 1 for side in shape)
            or (self.sobel and shape[0] not in (1, 3))
        ):
            raise ValueError(
                f"image_shape must be (channels, height, width), with 1 or 3 channels for sobel="
                f"True; got {shape!r}. Gray images of 28 x 28 pixels are (1, 28, 28)."
            )

    def _check_augmentation(self):
        known = sorted(VECTOR_AUGMENTATIONS if self.image_shape is None else IMAGE_AUGMENTATIONS)
        wanted = ImageAugmentation if self.image_shape is None else VectorAugmentation
        if isinstance(self.augmentation, wanted) or (
            isinstance(self.augmentation, str) and self.augmentation not in ("auto", *known)
        ):
            kind = "vectors" if self.image_shape is None else "images"
            raise ValueError(
                f"augmentation={self.augmentation!r} is none for {kind}. Use one of {known}, "
                "'auto', None or a callable; image_shape tells images from vectors."
            )

    def _check_weights(self):
        if isinstance(self.weights, str):
            return
        try:
            weights = np.asarray(self.weights, dtype=np.float64)
        except (TypeError, ValueError):
            weights = np.empty(0)
        if weights.shape != (self.n_clusters,) or not np.all(weights > 0):
            raise ValueError(
                f"weights must hold n_clusters={self.n_clusters} positive shares; got "
                f"{self.weights!r}. Give one for each cluster, 'learned' or 'uniform'."
            )
        if not math.isclose(weights.sum(), 1.0, rel_tol=1e-6):
            raise ValueError(
                f"weights must sum to 1; got a sum of {weights.sum():g}. Divide them by it."
            )

    def _check_scale(self, rows):
        super()._check_scale(rows)
        if self.image_shape is None:
            return
        if math.prod(self.image_shape) != rows.n_features:
            raise ValueError(
                f"image_shape={tuple(self.image_shape)} makes rows of "
                f"{math.prod(self.image_shape)} pixels; X has {rows.n_features} features. Give "
                "(channels, height, width) of the images that the rows of X hold."
            )
        low, high = (0.0, 1.0) if self.scale else rows.limits()
        if low < 0 or high > 1:
            raise ValueError(
                f"With scale=False pixels must lie from 0 to 1; got {low:g} to {high:g}. Set "
                "scale=True, or divide X by its largest value."
            )

    # --- Hooks of the base class: training ---------------------------------------------

    def _fit_restarts(self, fit):
        if self._has_equal_clusters() or fit.continues:
            return self._fit_outputs(fit)
        unequal, gaps = self._fit_pieces(fit)
        ended = unequal.history.interrupted or unequal.history.stopped
        if ended or not isinstance(self.weights, str):
            return unequal
        equal = self._fit_outputs(fit.another())
        cut, cut_of_equal = (
            gaps.cuts(trained.network, fit.rows.through(trained.network))[trained.restart]
            for trained in (unequal, equal)
        )
        return unequal if cut < CLEARER_CUT * cut_of_equal else equal

    def _fit_outputs(self, fit):
        """Train with an output for each cluster or, if training goes on, those of the last fit."""
        trained = super()._fit_restarts(fit)
        fit = fit.through(trained.network)
        if self.ensemble:
            table = contingencies(trained.network, fit.rows)
            trained.network.renumber(align(table, trained.restart))
        if not isinstance(self.weights, str):
            trained.network.membership.copy_(trained.network.membership > 0)
            impose_weights(trained.network, fit.rows, np.asarray(self.weights))
        return trained

    def _fit_pieces(self, fit):
        """Train more outputs than clusters, join them, and keep the most stable clear restart."""
        n_outputs = n_pieces(self.n_clusters, len(fit.rows.visited))
        fit, network = self._begin(fit, self._n_starts(), n_outputs=n_outputs)
        history = self._train_network(fit, network)
        finite = finite_members(network)
        self._refuse_divergence(finite)
        gaps = Gaps(network.prepare, fit.rows, fit.rng.numpy)
        gaps.merge_outputs(network, fit.rows)
        cuts, table = gaps.cuts(network, fit.rows), contingencies(network, fit.rows)
        similar = finite & (cuts <= SIMILAR_CUT * cuts[finite].min())
        restart = first_best(np.where(similar, -stability(table), np.inf))
        if self.ensemble:
            network.renumber(align(table, restart))
        if not isinstance(self.weights, str):
            impose_weights(network, fit.rows, np.asarray(self.weights))
        return Trained(network, history, restart=restart), gaps

    def _refuse_divergence(self, finite):
        """Raise FloatingPointError if all restarts have diverged, or any one of an ensemble."""
        if np.all(finite) or (np.any(finite) and not self.ensemble):
            return
        raise FloatingPointError(
            f"{np.count_nonzero(~finite)} of {len(finite)} restarts have diverged in training. "
            "Lower learning_rate_init, or standardise the data."
        )

    def _init_network(self, fit, n_restarts, n_outputs=None):
        arguments = self._network_arguments(fit.rows.n_features)
        arguments |= {"n_members": n_restarts, "n_outputs": n_outputs}
        network = NeuralMixtureNetwork(**arguments).init_weights(fit.rng.torch, fit.dtype)
        if self.scale and self.image_shape is None:
            network.scaler.fit(*fit.rows.moments())
        elif self.scale:
            network.scaler.fit_limits(*fit.rows.limits())
        return network

    def _train(self, fit, network):
        history = self._train_network(fit, network)
        return Trained(network, history, self._criterion(fit, network))

    def _train_network(self, fit, network):
        """Train the members; restarts of a large network race first: `History`."""
        n_epochs, before = self._n_epochs(fit.rows), History()
        if network.n_members > 1 and not self._is_perceptron() and not self.ensemble:
            before = self._race(fit, network, math.ceil(RACE * n_epochs))
        history = before
        if not before.interrupted and not before.stopped:
            history = self._stage(fit, network, n_epochs - before.n_iter, n_done=before.n_iter)
            history.prepend(before)
        network.eval().fit_statistics(fit.rows)
        return history

    def _race(self, fit, network, n_epochs):
        """Train all members for a while, and keep the one of lowest loss."""
        history = self._stage(fit, network, n_epochs, task="race", may_stop=False)
        best = 0
        if history.n_iter:
            losses = sum(history.terms[name][-1] for name in history.watch)
            best = first_best(np.where(np.isnan(losses), np.inf, losses))
        network.keep(best)
        history.terms = {n: [v[best : best + 1] for v in vs] for n, vs in history.terms.items()}
        return history

    def _stage(self, fit, network, n_epochs, n_done=0, **options):
        """Train for ``n_epochs`` after ``n_done`` epochs were done: `History`."""
        rows = fit.rows
        warm_up = max(0, self.consistency_warm_up - n_done)
        view = self._view(fit.rng.torch)
        if view is not None and view is self.augmentation:
            check_view(view, network.prepare(rows.take(rows.visited[:2])))
        return self._minimize(
            fit,
            network,
            MixtureEM(network, view, self._consistency_rate(), warm_up),
            max_iter=n_epochs,
            learning_rate=self._learning_rate(),
            precision=self.precision,
            # The parameter refers to the mean loss, `minimize` to the sum over a batch.
            weight_decay=self.weight_decay * rows.total_weight / self._n_batches(rows),
            **options,
        )

    def _learning_rate(self):
        if self.learning_rate_init != "auto":
            return self.learning_rate_init
        return LEARNING_RATE if self.image_shape is None else IMAGE_LEARNING_RATE

    def _consistency_rate(self):
        if not self.two_fold:
            return None
        return self.consistency_learning_rate or CONSISTENCY_SHARE * self._learning_rate()

    def _augmentation(self):
        """The view that ``augmentation`` names, the callable itself, or None."""
        if not isinstance(self.augmentation, str):
            return self.augmentation
        if self.image_shape is None:
            return VECTOR_AUGMENTATIONS.get(self.augmentation)  # None for 'auto'
        auto = "medium" if self.image_shape[0] == 1 else "natural"
        return IMAGE_AUGMENTATIONS[auto if self.augmentation == "auto" else self.augmentation]

    def _view(self, generator):
        augmentation = self._augmentation()
        ours = isinstance(augmentation, (ImageAugmentation, VectorAugmentation))
        return partial(augmentation, generator=generator) if ours else augmentation

    def _attributes_midway(self, fit, network):
        # Only the first restart: clusters of an ensemble are matched at the end of training.
        return super()._attributes_midway(fit, network.select(0).eval().fit_statistics(fit.rows))

    def _step_work(self, rows):
        # Each weight of a convolution meets every pixel.
        n_pixels = 1 if self.image_shape is None else math.prod(self.image_shape[1:])
        return super()._step_work(rows) * n_pixels * self._n_starts()

    def _check_continuation(self, rows):
        super()._check_continuation(rows)
        if not np.array_equal(self.weights, self._trained_weights):
            raise ValueError(
                f"Training goes on with a model of weights={self._trained_weights!r}; got "
                f"weights={self.weights!r}. Call fit with warm_start=False to start anew."
            )

    def _criterion(self, fit, network):
        finite = finite_members(network)
        self._refuse_divergence(finite)
        if network.n_members == 1:
            return 0.0
        if self.selection == "loss":
            values = sum_batchwise(lambda x, w: -w @ network.em_scores(x), fit.rows)
            criterion = values.cpu().numpy()
        else:
            criterion = -stability(contingencies(network, fit.rows))
        return np.where(finite, criterion, np.inf)

    def _fitted_arguments(self, fit, network):
        n_members = network.n_members if self.ensemble else 1
        trained = {"n_outputs": network.n_outputs, "n_members": n_members}
        return {**super()._fitted_arguments(fit, network), **trained}

    def _best_of(self, network, restart):
        return network if self.ensemble else network.select(restart)

    def _attributes(self, fit, trained):
        fitted = super()._attributes(fit, trained)
        n_clusters = self.n_clusters
        centers, shares = cluster_means(fit.rows, fitted["labels_"], n_clusters)
        if not isinstance(self.weights, str):
            shares = np.array(self.weights, dtype=np.float64)
        elif fitted["_arguments"]["n_outputs"] == n_clusters:
            shares = np.full(n_clusters, 1 / n_clusters)
        return {
            **fitted,
            "cluster_centers_": centers,
            "weights_": shares,
            "_trained_weights": copy.deepcopy(self.weights),
        }

    def _concerns(self, fit, trained):
        yield from super()._concerns(fit, trained)
        confidence = self.history_.get("confidence", np.zeros(1))
        if confidence[-1] < LOST_CONFIDENCE * confidence.max():
            yield (
                "Confidence, the mean of the largest posteriors, has fallen from "
                f"{confidence.max():.2f} to {confidence[-1]:.2f}: training runs to uniform "
                "posteriors. Lower consistency_learning_rate or set consistency_warm_up, lower "
                "learning_rate_init, or choose a weaker augmentation."
            )


def check_view(view, batch):
    """Raise ValueError unless a callable of the user maps a batch to one of its shape."""
    with torch.no_grad():
        found = view(batch.clone())
    shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
    if shape != tuple(batch.shape):
        raise ValueError(
            f"augmentation must map a tensor of shape {tuple(batch.shape)} to one of that shape; "
            f"it gave {shape}. Make one view of each row."
        )


def cluster_means(rows, labels, n_clusters):
    """Mean of the rows of each cluster (of all rows, for an empty one), and shares of the rows."""
    labels = torch.from_numpy(labels).to(rows.device)
    total = torch.zeros(n_clusters, rows.n_features + 1, dtype=torch.float64)
    for batch, index, weight in rows.batches(inference_batch_size(rows.n_features)):
        member = one_hot(labels[index], n_clusters).to(weight) * weight[:, None]
        member, batch = member.cpu().double(), batch.cpu().double()
        total += torch.cat([member.T @ batch, member.sum(dim=0)[:, None]], dim=1)
    nk = total[:, -1:]
    means = torch.where(nk > 0, total[:, :-1] / nk, rows.moments()[0])
    return means.numpy(), (nk[:, 0] / nk.sum()).numpy()
