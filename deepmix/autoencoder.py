"""Autoencoders: the network, its pretraining, and the base class of estimators with one."""

from numbers import Integral

import numpy as np
import torch
from sklearn.utils import check_array, check_consistent_length, check_random_state, column_or_1d
from sklearn.utils.validation import check_is_fitted
from torch import nn

from deepmix._torch import (
    Rows,
    full_precision,
    make_generator,
    own_modes,
    refuse_bad_weights,
    resolve_device,
    state_size,
    sum_batchwise,
    threads_for,
    to_host,
)
from deepmix.base import BaseDeepMixture
from deepmix.losses import squared_error
from deepmix.networks import (
    Standardizer,
    check_layer_sizes,
    check_shapes,
    is_meta,
    make_coder,
    materialize,
    trainable,
    widest,
)
from deepmix.parameters import ArrayLike, Auto, Coder, CountOrZero, Layers, Precision
from deepmix.training import History, Objective, Phase, minimize

# --- Networks --------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """An encoder and a decoder: ``x -> z -> x_hat``.

    Attributes
    ----------
    encoder, decoder : nn.Module
        Maps (B, n_features) -> (B, latent_dim) and back.

    Examples
    --------
    >>> import torch
    >>> from deepmix.autoencoder import Autoencoder
    >>> autoencoder = Autoencoder(torch.nn.Linear(4, 2), torch.nn.Linear(2, 4))
    >>> autoencoder(torch.zeros(3, 4)).shape
    torch.Size([3, 4])
    """

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x, return_code=False):
        z = self.encoder(x)
        x_hat = self.decoder(z)
        return (z, x_hat) if return_code else x_hat


def build_autoencoder(n_features, latent_dim, hidden_layer_sizes=(), encoder=None, decoder=None):
    """Build mirrored perceptrons, without weights yet, or take what the user gives.

    Parameters
    ----------
    n_features, latent_dim : int
    hidden_layer_sizes : tuple of int
        Layers of the encoder; the decoder has them in reverse.
    encoder, decoder : None, callable or nn.Module
        See `deepmix.networks.make_coder`.

    Returns
    -------
    Autoencoder
        With parts on the meta device, which `draw_autoencoder` gives weights to.
    """
    sizes = (n_features, *hidden_layer_sizes, latent_dim)
    return Autoencoder(
        make_coder(encoder, sizes, "encoder"), make_coder(decoder, sizes[::-1], "decoder")
    )


def draw_autoencoder(
    autoencoder, n_features, latent_dim, generator, scheme="glorot", dtype=torch.float32
):
    """Draw the weights of the parts that have none, on the CPU, and check their shapes.

    Parameters
    ----------
    autoencoder : Autoencoder
    n_features, latent_dim : int
    generator : torch.Generator
    scheme : {'glorot', 'glorot-normal', 'fan-in'}
        See `deepmix.networks.init_weights`.
    dtype : torch.dtype, default=torch.float32
        Floating-point type of the weights, which are drawn in float32.

    Returns
    -------
    Autoencoder
        The same object.

    Raises
    ------
    ValueError
        If a part does not map a batch to the shape that it should.
    """
    for name, n_in, n_out in (
        ("encoder", n_features, latent_dim),
        ("decoder", latent_dim, n_features),
    ):
        part = getattr(autoencoder, name)
        if is_meta(part):
            part = materialize(part, generator, scheme)
        part = part.to("cpu", dtype)
        check_shapes(part, n_in, n_out, name)
        setattr(autoencoder, name, part)
    return autoencoder


class AutoencoderNetwork(nn.Module):
    """Base class of networks that encode rows: a scaler of the data, and an autoencoder.

    Parameters
    ----------
    n_features, latent_dim : int
    hidden_layer_sizes : tuple of int
    encoder, decoder : None, callable or nn.Module
        As for `build_autoencoder`.
    """

    def __init__(self, n_features, latent_dim, hidden_layer_sizes=(), encoder=None, decoder=None):
        super().__init__()
        self.scaler = Standardizer(n_features)
        self.autoencoder = build_autoencoder(
            n_features, latent_dim, hidden_layer_sizes, encoder, decoder
        )

    @property
    def width(self):
        """Most numbers that a layer of the network makes of a row: int."""
        return max(len(self.scaler.mean), widest(self.autoencoder))

    def encode(self, x):
        """Codes: (B, n_features) -> (B, latent_dim)."""
        return self.autoencoder.encoder(self.scaler(x))

    def decode(self, z):
        """Rows in the units of the data: (B, latent_dim) -> (B, n_features)."""
        return self.scaler.inverse(self.autoencoder.decoder(z))

    def forward(self, x):
        return self.resp(x)

    def select(self, restart):
        return self


# --- Pretraining -----------------------------------------------------------------------


class ReconstructionObjective(Objective):
    """Mean squared error of an autoencoder on standardised rows.

    Parameters
    ----------
    autoencoder : Autoencoder
    scaler : nn.Module
        Scaler that is applied to each batch first.
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
    """Mean squared error of a pretrained autoencoder: the unit of its later errors.

    Parameters
    ----------
    network : nn.Module
        Network with ``scaler`` and ``autoencoder``, in eval mode.
    rows : Rows
    least : float
        Lower limit of the unit, as a share of the variance of the scaled rows: an autoencoder that
        copies its input has no error.

    Returns
    -------
    float
        The unit, 1 if all rows are equal.
    """

    def error(batch, weight):
        x = network.scaler(batch)
        return squared_error(x, network.autoencoder(x), weight).double().cpu()

    mean = float(sum_batchwise(error, rows)) / rows.total_weight
    scale = network.scaler.scale.cpu().double()
    variance = float((rows.moments()[1] / scale.square()).sum())
    return max(mean, least * variance) or 1.0


@own_modes()
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
        Layers of the encoder; the decoder has them in reverse.
    latent_dim : int, default=10
        Dimension of the codes.
    max_iter : int, default=50
        Epochs.
    batch_size : int, default=256
        Rows in a step.
    learning_rate_init : float, default=1e-3
        Step size of Adam.
    sample_weight : array-like of shape (n_samples,), default=None
        How often each row counts.
    device : str or torch.device, default='auto'
        Where to compute.
    random_state : int, RandomState instance or None, default=None
        Determines initial weights and the order of rows.

    Returns
    -------
    autoencoder : Autoencoder
        Trained network on the CPU, in float32, in eval mode.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from deepmix import pretrain_autoencoder
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
    sizes = X.shape[1], latent_dim
    autoencoder = build_autoencoder(*sizes, hidden_layer_sizes)
    draw_autoencoder(autoencoder, *sizes, generator)
    with threads_for(min(batch_size, len(rows.visited)) * state_size(autoencoder)):
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


# --- Estimators ------------------------------------------------------------------------


class AutoencoderMixture(BaseDeepMixture, abstract=True):
    """Base class of estimators with an autoencoder; the network is an `AutoencoderNetwork`.

    The estimator has the parameters ``hidden_layer_sizes``, ``latent_dim``, ``encoder``,
    ``decoder``, ``pretrain_max_iter``, ``scale`` and ``precision``. ``_centers_attribute`` names
    its fitted centres among the codes.
    """

    # Parameters that this class reads.
    hidden_layer_sizes: Layers
    encoder: Coder | None
    decoder: Coder | None
    pretrain_max_iter: CountOrZero | Auto
    scale: bool
    precision: Precision

    _centers_attribute = "latent_centers_"
    _weights_scheme = "glorot"

    def inverse_transform(self, X: ArrayLike) -> np.ndarray:
        """Decode codes.

        Parameters
        ----------
        X : array-like of shape (n_samples, latent_dim)

        Returns
        -------
        X_original : ndarray of shape (n_samples, n_features)
        """
        check_is_fitted(self)
        codes = check_array(to_host(X), dtype=[np.float64, np.float32], order="C")
        if codes.shape[1] != self._n_features_out:
            raise ValueError(
                f"X has {codes.shape[1]} columns; expected codes of latent_dim="
                f"{self._n_features_out} dimensions, as transform gives them."
            )
        return self._apply("decode", codes)

    def interpolate(self, start: int, stop: int, n_steps: int = 9) -> np.ndarray:
        """Decode the straight line between two centres.

        Parameters
        ----------
        start, stop : int
            Numbers of two clusters.
        n_steps : int, default=9
            Points on the line, both ends included.

        Returns
        -------
        X : ndarray of shape (n_steps, n_features)
        """
        check_is_fitted(self)
        steps = np.linspace(0, 1, n_steps)[:, None]
        ends = getattr(self, self._centers_attribute)[[start, stop]]
        return self.inverse_transform((1 - steps) * ends[0] + steps * ends[1])

    # --- Hooks of the base class -----------------------------------------------------

    @property
    def _n_features_out(self):
        return self._arguments["latent_dim"]

    def _check_parameters(self):
        super()._check_parameters()
        check_layer_sizes(self.hidden_layer_sizes)

    def _latent_dim(self, n_features):
        """Dimension of the codes."""
        return self.latent_dim

    def _n_clusters(self):
        """Clusters that a fit begins with."""
        return self.n_clusters

    def _network_arguments(self, n_features):
        return {
            "n_features": n_features,
            "n_clusters": self._n_clusters(),
            "latent_dim": self._latent_dim(n_features),
            "hidden_layer_sizes": tuple(self.hidden_layer_sizes),
            "encoder": self.encoder,
            "decoder": self.decoder,
        }

    def _init_network(self, fit, n_restarts):
        """A network with an autoencoder of drawn weights, and the scaler fitted."""
        arguments = self._network_arguments(fit.rows.n_features)
        network = self._network_class(**arguments)
        sizes = arguments["n_features"], arguments["latent_dim"]
        scheme = {"scheme": self._weights_scheme, "dtype": fit.dtype}
        draw_autoencoder(network.autoencoder, *sizes, fit.rng.torch, **scheme)
        network = network.to(fit.dtype)
        if self.scale:
            self._fit_scaler(network.scaler, fit.rows)
        return network

    def _fit_scaler(self, scaler, rows):
        scaler.fit(*rows.moments())

    def _minimize(self, fit, network, objective, **options):
        return super()._minimize(fit, network, objective, precision=self.precision, **options)

    def _pretrain(self, fit, network, **options):
        """Train the autoencoder alone, unless training goes on or nothing of it is trained."""
        if fit.continues or not trainable(network.autoencoder):
            return History()
        objective = ReconstructionObjective(network.autoencoder, network.scaler)
        options = {"max_iter": self.pretrain_max_iter, "task": "pretrain", **options}
        return self._minimize(fit, network, objective, **options)


def decoded(network, centers):
    """What centres among the codes decode to: ndarray of shape (n_clusters, n_features)."""
    with torch.inference_mode():
        return network.decode(centers).double().cpu().numpy().copy()
