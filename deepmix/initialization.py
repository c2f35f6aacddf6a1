"""Where training starts: centres by k-means and its kin, autoencoders by reconstruction."""

import warnings
from numbers import Integral

import numpy as np
import torch
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import pairwise_distances_argmin
from sklearn.utils import check_array, check_consistent_length, check_random_state, column_or_1d

from deepmix._torch import (
    Rows,
    full_precision,
    inference_batch_size,
    make_generator,
    refuse_bad_weights,
    resolve_device,
    sum_batchwise,
    to_host,
)
from deepmix.gaussian_mixture import fit_gaussian_mixture
from deepmix.losses import squared_error
from deepmix.networks import Autoencoder, check_shapes, is_meta, make_coder, materialize, trainable
from deepmix.training import Objective, Phase, minimize

# Numbers in the sample of rows from which centres are started: 16 MiB in float32, all the
# rows of most tables, 5,000 rows of MNIST.
SAMPLE_BUDGET = 2**22

# --- Choice among restarts ---------------------------------------------------------------


def first_best(values):
    """Index of the first value that is the smallest but for rounding.

    Restarts that end in one partition under several names differ by rounding only: which of them
    is kept should not depend on the processor.

    Parameters
    ----------
    values : array-like of shape (n_restarts,)
        Of which some may be infinite.

    Returns
    -------
    int
    """
    values = np.asarray(values, dtype=np.float64)
    best = values.min()
    slack = 1e-6 * abs(best) if np.isfinite(best) else 0.0
    return int(np.argmax(values <= best + slack))


# --- Centres ---------------------------------------------------------------------------


def initial_centers(init, X, n_clusters, random_state, sample_weight=None, n_init=1):
    """Choose cluster centres.

    Parameters
    ----------
    init : {'k-means++', 'k-means'}, callable or array-like of shape (n_clusters, n_features)
        ``'k-means'`` runs Lloyd's algorithm from ``'k-means++'``. A callable is called as
        ``init(X, n_clusters, random_state=random_state)``.
    X : ndarray of shape (n_samples, n_features)
    n_clusters : int
    random_state : RandomState
    sample_weight : ndarray of shape (n_samples,) or None
    n_init : int, default=1
        Runs of ``'k-means'``, of which the one of lowest inertia is kept.

    Returns
    -------
    centers : ndarray of shape (n_clusters, n_features)
    """
    if callable(init):
        return check_centers(init(X, n_clusters, random_state=random_state), n_clusters, X.shape[1])
    if not isinstance(init, str):
        return check_centers(init, n_clusters, X.shape[1])
    X, sample_weight = canonical_order(X, sample_weight)
    if not np.all(np.isfinite(X)):
        raise FloatingPointError(
            "The rows that clusters are started from are not finite: training before has diverged. "
            "Lower learning_rate_init, set max_grad_norm, or standardise the data."
        )
    with np.errstate(over="ignore", invalid="ignore"):  # of squares; what comes of it is looked at
        if init == "k-means++":
            return _plus_plus(X, n_clusters, random_state, sample_weight)
        runs = [_lloyd(X, n_clusters, random_state, sample_weight) for _ in range(n_init)]
    return runs[first_best([run.inertia_ for run in runs])].cluster_centers_


def _plus_plus(X, n_clusters, random_state, sample_weight):
    centers, _ = kmeans_plusplus(
        X, n_clusters, sample_weight=sample_weight, random_state=random_state
    )
    return centers


def _lloyd(X, n_clusters, random_state, sample_weight):
    start = _plus_plus(X, n_clusters, random_state, sample_weight)
    with warnings.catch_warnings():
        # Fewer distinct rows than clusters: the estimator says so after its own fit.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return KMeans(n_clusters, init=start, n_init=1).fit(X, sample_weight=sample_weight)


def check_centers(centers, n_clusters, n_features):
    """Validate centres from a user: ndarray of shape (n_clusters, n_features)."""
    centers = check_array(centers, dtype=np.float64, input_name="init")
    if centers.shape != (n_clusters, n_features):
        raise ValueError(
            f"init has shape {centers.shape}; expected (n_clusters, n_features) = "
            f"({n_clusters}, {n_features}). Give one centre for each cluster."
        )
    return centers


def canonical_order(X, sample_weight):
    """Sort rows and drop those of weight zero.

    k-means++ draws by inverse distribution function, so in a fixed order its draws depend
    neither on how the rows were permuted nor on whether a row is repeated or weighted. By value,
    not by bytes: a shift of all rows in the last digit must not change the order.
    """
    if sample_weight is not None:
        X, sample_weight = X[sample_weight > 0], sample_weight[sample_weight > 0]
    order = np.lexsort(X.T)
    return X[order], None if sample_weight is None else sample_weight[order]


def sample_rows(rows, function, n_clusters, random_state, max_rows=None):
    """Apply ``function`` to a random sample of rows, for `initial_centers`.

    Parameters
    ----------
    rows : Rows
    function : callable
        A batch (B, n_features) -> a batch, for example a standardiser.
    n_clusters : int
        At least 100 rows for each are taken, where there are so many.
    random_state : RandomState
    max_rows : int or None
        None takes as many as make `SAMPLE_BUDGET` numbers.

    Returns
    -------
    X : ndarray of shape (n_sampled, n_features_out)
    sample_weight : ndarray of shape (n_sampled,) or None
    """
    visited = rows.visited
    size = max(max_rows or SAMPLE_BUDGET // rows.n_features, 100 * n_clusters)
    if len(visited) > size:
        chosen = random_state.choice(len(visited), size, replace=False)
        visited = visited[torch.from_numpy(np.sort(chosen))]
    step = inference_batch_size(rows.n_features)
    with torch.inference_mode():
        X = torch.cat([function(rows.take(index)).cpu() for index in visited.split(step)])
    weight = None if rows.uniform else rows.weight[visited.to(rows.weight.device)].cpu().double()
    return X.numpy(), None if weight is None else weight.numpy()


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
    best = runs[first_best([-float(run.lower_bound) for run in runs])].parameters
    within = torch.einsum("k,kij->ij", best.weights, best.covariances)
    return best.means + torch.from_numpy(origin), within


# --- Autoencoders ----------------------------------------------------------------------


class ReconstructionObjective(Objective):
    """Mean squared error of an autoencoder on standardised rows.

    Parameters
    ----------
    autoencoder : Autoencoder
    scaler : nn.Module
        Applied to each batch first.
    """

    def __init__(self, autoencoder, scaler):
        self.autoencoder, self.scaler = autoencoder, scaler

    def phases(self):
        return (Phase(trainable(self.autoencoder), self.step),)

    def step(self, batch, index, weight):
        x = self.scaler(batch)
        x_hat = self.autoencoder(x)
        with full_precision(x.device):
            # The mean over features keeps the term near one whatever the width.
            return {"reconstruction": squared_error(x, x_hat.to(x), weight) / x.shape[1]}


def reconstruction_unit(network, rows, least):
    """Squared error of a row by a pretrained autoencoder: what its later errors are counted in.

    Parameters
    ----------
    network : nn.Module
        With ``scaler`` and ``autoencoder``, in eval mode.
    rows : Rows
    least : float
        Share of the variance of the scaled rows that it is at least; a copy has no error.

    Returns
    -------
    float
        1 where rows are all equal.
    """

    def error(batch, weight):
        x = network.scaler(batch)
        return squared_error(x, network.autoencoder(x), weight).double().cpu()

    mean = float(sum_batchwise(error, rows)) / rows.total_weight
    scale = network.scaler.scale.cpu().double()
    variance = float((rows.moments()[1] / scale.square()).sum())
    return max(mean, least * variance) or 1.0


def build_autoencoder(
    n_features,
    hidden_layer_sizes,
    latent_dim,
    generator,
    *,
    encoder=None,
    decoder=None,
    scheme="glorot",
    dtype=torch.float32,
):
    """Build an autoencoder on the CPU: mirrored MLPs, or what the user gives.

    Parameters
    ----------
    n_features : int
    hidden_layer_sizes : tuple of int
        Of the encoder; the decoder has them in reverse.
    latent_dim : int
    generator : torch.Generator
        Draws the weights of every part that is not an `nn.Module` instance.
    encoder, decoder : None, callable or nn.Module
        See `deepmix.networks.make_coder`.
    scheme : {'glorot', 'glorot-normal'}
        See `deepmix.networks.init_weights`.
    dtype : torch.dtype, default=torch.float32
        Of its weights, which are drawn in float32.

    Returns
    -------
    Autoencoder

    Raises
    ------
    ValueError
        If a part does not map what it should to what it should.
    """
    sizes = (n_features, *hidden_layer_sizes, latent_dim)
    parts = []
    for spec, shape, name in ((encoder, sizes, "encoder"), (decoder, sizes[::-1], "decoder")):
        part = make_coder(spec, shape, name)
        if is_meta(part):
            part = materialize(part, generator, scheme)
        part = part.to("cpu", dtype)
        check_shapes(part, shape[0], shape[-1], name)
        parts.append(part)
    return Autoencoder(*parts)


def pretrain_autoencoder(
    X,
    *,
    hidden_layer_sizes=(500, 500, 2000),
    latent_dim=10,
    max_iter=50,
    batch_size=256,
    learning_rate_init=1e-3,
    sample_weight=None,
    device="auto",
    random_state=None,
):
    """Train an autoencoder once, to be handed to several estimators.

    Estimators copy the networks that they are given, so one pretrained pair can serve many:
    pass ``encoder=autoencoder.encoder, decoder=autoencoder.decoder, pretrain_max_iter=0`` and
    ``scale=False``.

    Parameters
    ----------
    X : array-like of shape (n_samples, n_features)
        Used as it is: scale it as the estimators will see it.
    hidden_layer_sizes : tuple of int, default=(500, 500, 2000)
        Of the encoder; the decoder has them in reverse.
    latent_dim : int, default=10
        Dimension of the codes.
    max_iter : int, default=50
        Epochs.
    batch_size : int, default=256
        Rows in a step.
    learning_rate_init : float, default=1e-3
        Adam's step size.
    sample_weight : array-like of shape (n_samples,), default=None
        How often each row counts.
    device : str or torch.device, default='auto'
        Where to compute.
    random_state : int, RandomState instance or None, default=None
        Determines initial weights and the order of rows.

    Returns
    -------
    autoencoder : deepmix.networks.Autoencoder
        On the CPU, in float32, in eval mode.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from deepmix.initialization import pretrain_autoencoder
    >>> X = load_iris().data / 8
    >>> autoencoder = pretrain_autoencoder(
    ...     X, hidden_layer_sizes=(16,), latent_dim=2, max_iter=5, random_state=0
    ... )
    >>> type(autoencoder.encoder).__name__
    'MLP'
    """
    sizes = {"latent_dim": latent_dim, "batch_size": batch_size}
    sizes |= {"hidden_layer_sizes": hidden_layer_sizes}
    for name, value in sizes.items():
        if not all(isinstance(n, Integral) and n >= 1 for n in np.atleast_1d(value).tolist()):
            raise ValueError(f"{name} must be made of integers >= 1; got {value!r}.")
    X = check_array(to_host(X), accept_sparse="csr", dtype=[np.float64, np.float32])
    generator = make_generator(check_random_state(random_state))
    device = resolve_device(device)
    if sample_weight is not None:
        sample_weight = column_or_1d(to_host(sample_weight), dtype=np.float64)
        check_consistent_length(X, sample_weight)
        refuse_bad_weights(sample_weight)
    rows = Rows(X, device, torch.float32, sample_weight)
    autoencoder = build_autoencoder(X.shape[1], hidden_layer_sizes, latent_dim, generator)
    minimize(
        ReconstructionObjective(autoencoder.to(device), torch.nn.Identity()),
        rows,
        learning_rate=learning_rate_init,
        batch_size=batch_size,
        max_iter=max_iter,
        generator=generator,
        task="pretrain",
    )
    return autoencoder.cpu().eval()
