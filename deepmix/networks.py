"""Encoders, decoders and their initial weights.

Weights are drawn from a generator, never from torch's global one.
"""

import copy
import itertools
import math

import torch
from torch import nn

# --- Initial weights -------------------------------------------------------------------


def init_weights(module, generator, bias="zeros"):
    """Draw Glorot-uniform kernels for every linear and convolutional layer, in place.

    Parameters
    ----------
    module : nn.Module
        On the CPU.
    generator : torch.Generator
    bias : {'zeros', 'glorot'}
        ``'glorot'`` draws each bias of length n from a normal of standard deviation
        ``1 / sqrt(n)`` truncated at two deviations, as the authors of AE-CM do.
    """
    for layer in module.modules():
        own = dict(layer.named_parameters(recurse=False))
        weight, rest = own.get("weight"), set(own) - {"weight", "bias"}
        if weight is not None and weight.dim() >= 2 and not rest:
            nn.init.xavier_uniform_(weight, generator=generator)
            if "bias" in own:
                init_bias(own["bias"], generator, bias)
        elif hasattr(layer, "reset_parameters") and all(p.dim() < 2 for p in own.values()):
            layer.reset_parameters()  # normalisation layers: constants, no draw
        elif own:
            raise ValueError(
                f"{type(layer).__name__} has parameters {sorted(own)} that a network built by a "
                "callable cannot draw: only linear, convolutional and normalisation layers are "
                "known. Pass an nn.Module instance instead; its weights are kept."
            )
    return module


def init_bias(tensor, generator, bias):
    """Set a bias in place: 'zeros', or 'glorot' (see `init_weights`)."""
    if bias == "zeros":
        return nn.init.zeros_(tensor)
    # A normal cut at two deviations has .8796 of its deviation: the cut one is to have 1/sqrt(n).
    deviation = 1.0 / (0.87962566103423978 * math.sqrt(tensor.shape[-1]))
    return nn.init.trunc_normal_(
        tensor, std=deviation, a=-2 * deviation, b=2 * deviation, generator=generator
    )


# --- Multi-layer perceptrons -----------------------------------------------------------


class MLP(nn.Sequential):
    """Dense layers with leaky ReLU between them and none after the last.

    Parameters
    ----------
    sizes : sequence of int
        Width of the input, of each hidden layer, and of the output.
    negative_slope : float, default=0.2
        Of the leaky ReLU.
    """

    def __init__(self, sizes, negative_slope=0.2):
        layers = []
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), nn.LeakyReLU(negative_slope, inplace=True)]
        super().__init__(*layers[:-1])


class Autoencoder(nn.Module):
    """An encoder and a decoder: ``x -> z -> x_hat``.

    Attributes
    ----------
    encoder, decoder : nn.Module
        (B, n_features) -> (B, latent_dim) and back.
    """

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x, return_code=False):
        z = self.encoder(x)
        x_hat = self.decoder(z)
        return (z, x_hat) if return_code else x_hat


# --- Clustering head -------------------------------------------------------------------


class ClusteringNetwork(nn.Module):
    """Softmax encoder and affine decoder, for ``n_restarts`` models side by side.

    Eq. 6 of Boubekki et al. (2021).

    Attributes
    ----------
    encoder_weight : Tensor of shape (n_features, n_restarts * n_clusters)
    encoder_bias : Tensor of shape (n_restarts * n_clusters,)
    decoder_weight : Tensor of shape (n_restarts, n_clusters, n_features)
    decoder_bias : Tensor of shape (n_restarts, 1, n_features)
    """

    def __init__(self, n_features, n_clusters, n_restarts=1):
        super().__init__()
        self.n_restarts, self.n_clusters = n_restarts, n_clusters
        width = n_restarts * n_clusters
        self.encoder_weight = nn.Parameter(torch.zeros(n_features, width))
        self.encoder_bias = nn.Parameter(torch.zeros(width))
        self.decoder_weight = nn.Parameter(torch.zeros(n_restarts, n_clusters, n_features))
        self.decoder_bias = nn.Parameter(torch.zeros(n_restarts, 1, n_features))

    def centers(self):
        """Images of the unit vectors, bias included: (n_restarts, n_clusters, n_features)."""
        return self.decoder_weight + self.decoder_bias

    def log_resp(self, x):
        """Log-responsibilities: (B, n_features) -> (B, n_restarts, n_clusters)."""
        logits = torch.addmm(self.encoder_bias, x, self.encoder_weight)
        return logits.view(-1, self.n_restarts, self.n_clusters).log_softmax(dim=2)

    def select(self, restart):
        """One of the models, as a network of its own."""
        chosen = ClusteringNetwork(len(self.encoder_weight), self.n_clusters)
        part = slice(restart * self.n_clusters, (restart + 1) * self.n_clusters)
        chosen.encoder_weight.data = self.encoder_weight.data[:, part]
        chosen.encoder_bias.data = self.encoder_bias.data[part]
        chosen.decoder_weight.data = self.decoder_weight.data[restart : restart + 1]
        chosen.decoder_bias.data = self.decoder_bias.data[restart : restart + 1]
        return chosen

    @torch.no_grad()
    def init_random(self, generator, gain=1.0):
        """Glorot: uniform kernels, and the authors' normal biases; logits times ``gain``."""
        fans = self.encoder_weight.shape[0] + self.n_clusters
        bound = (6.0 / fans) ** 0.5
        for kernel in (self.encoder_weight, self.decoder_weight):
            kernel.uniform_(-bound, bound, generator=generator)
        for bias in (self.encoder_bias.view(self.n_restarts, -1), self.decoder_bias):
            init_bias(bias, generator, "glorot")
        self.encoder_weight.mul_(gain)
        self.encoder_bias.mul_(gain)
        return self

    @torch.no_grad()
    def init_orthonormal(self, generator, gain):
        """Orthonormal centres U and logits ``gain * z @ U.T``; zero biases.

        With K more than the latent dimension the centres are orthonormal as columns only.
        """
        nn.init.orthogonal_(self.decoder_weight[0], generator=generator)
        self.decoder_bias.zero_()
        self.encoder_weight.copy_(gain * self.decoder_weight[0].T)
        self.encoder_bias.zero_()
        return self

    @torch.no_grad()
    def init_centers(self, centers, temperature):
        r"""Set the decoder to ``centers`` and the encoder to their posterior.

        .. math:: s_{ik} = 2 \tau x_i^\top \mu_k - \tau \lVert \mu_k \rVert^2

        are, up to a constant, :math:`-\tau \lVert x_i - \mu_k \rVert^2`: the arg-max is the
        nearest centre, for any temperature :math:`\tau`; the paper's covariance I/2 is
        :math:`\tau = 1`.

        Parameters
        ----------
        centers : Tensor of shape (n_restarts, n_clusters, n_features)
        temperature : float
        """
        flat = centers.reshape(-1, centers.shape[2])
        self.decoder_weight.copy_(centers)
        self.decoder_bias.zero_()
        self.encoder_weight.copy_(2 * temperature * flat.T)
        self.encoder_bias.copy_(-temperature * flat.square().sum(dim=1))
        return self

    @torch.no_grad()
    def init_pseudo_inverse(self, centers):
        """The paper's start (Sec. 4.1): the encoder inverts the decoder; biases are zero."""
        self.decoder_weight.copy_(centers)
        self.decoder_bias.zero_()
        self.encoder_weight.copy_(torch.cat(list(torch.linalg.pinv(centers)), dim=1))
        self.encoder_bias.zero_()
        return self


# --- Scaling ---------------------------------------------------------------------------


class Standardizer(nn.Module):
    """Centre the data and divide by one number, so that a feature has unit variance on average.

    One number for all features: Euclidean clusters stay what they are.

    Attributes
    ----------
    mean : Tensor of shape (n_features,)
    scale : Tensor of shape ()
    """

    def __init__(self, n_features):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(()))

    def fit(self, mean, total_variance):
        """Set the buffers from `Rows.moments`; constant data keep their scale."""
        self.mean.copy_(mean)
        if total_variance > 0:
            self.scale.fill_(math.sqrt(total_variance / len(mean)))
        return self

    def forward(self, x):
        return (x - self.mean) / self.scale

    def inverse(self, x):
        """Back to the units of the data."""
        return x * self.scale + self.mean


class FeatureScaler(nn.Module):
    """Centre each feature and divide it by its deviation, or divide each row by its norm.

    Attributes
    ----------
    mean, scale : Tensor of shape (n_features,)
    """

    def __init__(self, n_features, normalize=False):
        super().__init__()
        self.normalize = normalize
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))

    def fit(self, mean, variance):
        """Set the buffers; constant features keep their scale."""
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(variance > 0, variance.sqrt(), 1.0))
        return self

    def forward(self, x):
        if self.normalize:
            return nn.functional.normalize(x, dim=1)
        return (x - self.mean) / self.scale

    def inverse(self, x):
        return x * self.scale + self.mean

    def log_volume(self):
        """Log of the factor by which the map shrinks volumes."""
        return self.scale.log().sum()


class Whitener(nn.Module):
    """An invertible affine map of codes: the identity until `fit`.

    Attributes
    ----------
    mean : Tensor of shape (p,)
    matrix, inverse_matrix : Tensor of shape (p, p)
    """

    def __init__(self, n_dimensions):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_dimensions))
        self.register_buffer("matrix", torch.eye(n_dimensions))
        self.register_buffer("inverse_matrix", torch.eye(n_dimensions))

    def fit(self, mean, matrix):
        """Set the map to ``(z - mean) @ matrix``."""
        self.mean.copy_(mean)
        self.matrix.copy_(matrix)
        self.inverse_matrix.copy_(torch.linalg.inv(matrix))
        return self

    def forward(self, z):
        return (z - self.mean) @ self.matrix

    def inverse(self, z):
        return z @ self.inverse_matrix + self.mean


# --- Building without the global random state ------------------------------------------


def build_on_meta(factory):
    """Call ``factory()`` under torch's meta device: no memory, and no random number, is used."""
    with torch.device("meta"):
        return factory()


def materialize(module, generator, bias="zeros"):
    """Give a module from `build_on_meta` memory on the CPU and weights from ``generator``."""
    if any(
        buffer.is_meta and not _resettable(module, name) for name, buffer in module.named_buffers()
    ):
        raise ValueError(
            f"{type(module).__name__} registers buffers, which a network built by a callable "
            "cannot keep. Compute them in forward, or pass an nn.Module instance instead."
        )
    return init_weights(module.to_empty(device="cpu"), generator, bias)


def _resettable(module, buffer_name):
    """Whether the layer that owns a buffer can restore it: batch normalisation can."""
    owner, _, _ = buffer_name.rpartition(".")
    return hasattr(module.get_submodule(owner), "reset_running_stats")


def make_coder(spec, sizes, name):
    """Turn the parameter ``encoder`` or ``decoder`` into a module.

    Parameters
    ----------
    spec : None, callable or nn.Module
        None: an `MLP` of ``sizes``, on the meta device. A callable ``(n_in, n_out) ->
        nn.Module`` is called under the meta device. A module is copied, weights and all.
    sizes : tuple of int
    name : str
        Of the parameter, for messages.

    Returns
    -------
    nn.Module
    """
    if spec is None:
        return build_on_meta(lambda: MLP(sizes))
    if isinstance(spec, nn.Module):
        return copy.deepcopy(spec)
    module = build_on_meta(lambda: spec(sizes[0], sizes[-1]))
    if isinstance(module, nn.Module) and not is_meta(module):
        return copy.deepcopy(module)  # one that was there before: never trained in place
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"{name} must return a torch.nn.Module when called with (n_in, n_out) = "
            f"({sizes[0]}, {sizes[-1]}); got {type(module).__name__}."
        )
    return module


def trainable(module):
    """Parameters of a module but for those that its owner has frozen: tuple of Parameter."""
    return tuple(p for p in module.parameters() if p.requires_grad)


def is_meta(module):
    """Whether a module still waits for `materialize`."""
    return any(p.is_meta for p in module.parameters())


def check_shapes(module, n_in, n_out, name):
    """Raise ValueError unless ``module`` maps a batch (2, n_in) to (2, n_out)."""
    mode = module.training
    try:
        with torch.no_grad():
            shape = tuple(module.eval()(torch.zeros(2, n_in)).shape)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{name} cannot be applied to a batch of shape (2, {n_in}): {error}"
        ) from error
    finally:
        module.train(mode)
    if shape != (2, n_out):
        raise ValueError(
            f"{name} must map a batch of shape (2, {n_in}) to (2, {n_out}); it gave {shape}. "
            "Check its sizes against n_features and latent_dim."
        )
