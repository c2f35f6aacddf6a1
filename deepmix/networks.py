"""Encoders, decoders and their initial weights.

Weights are drawn from a generator, never from torch's global one.
"""

import copy
import itertools
import math
from functools import partial
from numbers import Integral

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from deepmix.linalg import inv

DROPOUTS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

# --- Initial weights -------------------------------------------------------------------


def init_weights(module, generator, scheme="glorot"):
    """Draw the kernel and bias of every linear and convolutional layer, in place.

    Parameters
    ----------
    module : nn.Module
        Network on the CPU.
    generator : torch.Generator
    scheme : {'glorot', 'glorot-normal', 'fan-in'}
        The first two have Glorot-uniform kernels, with zero biases or with normal ones, as the
        authors of AE-CM draw them (see `init_bias`). ``'fan-in'`` is how PyTorch's own layers
        start: kernel and bias uniform within ``1 / sqrt(fan_in)``.
    """
    for layer in module.modules():
        own = dict(layer.named_parameters(recurse=False))
        weight, rest = own.get("weight"), set(own) - {"weight", "bias"}
        if weight is not None and weight.dim() >= 2 and not rest:
            _init_layer(weight, own.get("bias"), generator, scheme)
        elif _is_constant_at_first(layer, own):
            layer.reset_parameters()
        elif own:
            raise ValueError(
                f"{type(layer).__name__} has parameters {sorted(own)} that a network built by a "
                "callable cannot draw: only linear, convolutional and normalisation layers are "
                "known. Pass an nn.Module instance instead; its weights are kept."
            )
    return module


def _is_constant_at_first(layer, own):
    """Whether ``reset_parameters`` of a layer draws no numbers, as in normalisation layers.

    A layer whose weight is computed from others (`torch.nn.utils.parametrizations`) is excluded: it
    would draw that weight from torch's global generator.
    """
    vectors = all(parameter.dim() < 2 for parameter in own.values())
    return vectors and hasattr(layer, "reset_parameters") and not is_parametrized(layer)


def _init_layer(weight, bias, generator, scheme):
    if scheme == "fan-in":
        bound = weight[0].numel() ** -0.5
        nn.init.uniform_(weight, -bound, bound, generator=generator)
    else:
        nn.init.xavier_uniform_(weight, generator=generator)
    if bias is None:
        return
    if scheme == "fan-in":
        nn.init.uniform_(bias, -bound, bound, generator=generator)
    elif scheme == "glorot-normal":
        init_bias(bias, generator)
    else:
        nn.init.zeros_(bias)


def init_bias(tensor, generator):
    """Draw a bias of length n from a normal of deviation ``1 / sqrt(n)`` cut at two deviations."""
    # Cutting a normal at two deviations leaves 0.8796 of its deviation, which is undone here.
    deviation = 1.0 / (0.87962566103423978 * math.sqrt(tensor.shape[-1]))
    return nn.init.trunc_normal_(
        tensor, std=deviation, a=-2 * deviation, b=2 * deviation, generator=generator
    )


def widest(module):
    """Outputs of the widest dense layer of a network, 1 if it has none."""
    return max((m.out_features for m in module.modules() if isinstance(m, nn.Linear)), default=1)


# --- Multi-layer perceptrons -----------------------------------------------------------


class MLP(nn.Sequential):
    """Dense layers with leaky ReLU between them and none after the last.

    Parameters
    ----------
    sizes : sequence of int
        Width of the input, of each hidden layer, and of the output.
    negative_slope : float, default=0.2
        Slope of the leaky ReLU for negative values.
    """

    def __init__(self, sizes, negative_slope=0.2):
        layers = []
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), nn.LeakyReLU(negative_slope, inplace=True)]
        super().__init__(*layers[:-1])


class StackedMLP(nn.Module):
    """Perceptrons of one shape side by side, with ReLU between layers and none after the last.

    (B, n_in) -> (B, n_members, n_out): one batched product a layer, whatever their number.

    Parameters
    ----------
    sizes : sequence of int
        Width of the input, of each hidden layer, and of the output.
    n_members : int, default=1
    """

    def __init__(self, sizes, n_members=1):
        super().__init__()
        pairs = list(itertools.pairwise(sizes))
        zeros = partial(torch.zeros, dtype=torch.float32)  # whatever torch's default
        self.weights = nn.ParameterList([zeros(n_members, n, m) for n, m in pairs])
        self.biases = nn.ParameterList([zeros(n_members, 1, m) for _, m in pairs])

    def forward(self, x):
        x = x.expand(len(self.weights[0]), *x.shape)
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            x = x if i == last else x.relu_()
        return x.transpose(0, 1)

    @torch.no_grad()
    def init_weights(self, generator):
        """Start as PyTorch's own layers do: uniform within ``1 / sqrt(fan_in)``."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = weight.shape[1] ** -0.5
            weight.uniform_(-bound, bound, generator=generator)
            bias.uniform_(-bound, bound, generator=generator)
        return self

    def select(self, member):
        """One of the perceptrons, as a stack of one."""
        chosen = copy.deepcopy(self)
        for parameters in (chosen.weights, chosen.biases):
            for parameter in parameters:
                parameter.data = parameter.data[member : member + 1]
        return chosen


class Members(nn.ModuleList):
    """Networks of any kind side by side: (B, ...) -> (B, n_members, n_out), one after another."""

    def forward(self, x):
        return torch.stack([network(x) for network in self], dim=1)

    def select(self, member):
        """One of the networks, as the only member."""
        return Members([self[member]])


# --- Convolutional networks ------------------------------------------------------------

# Table 2 of Tissera et al. (2022), without the last layer.
CONVOLUTIONS = {
    "mnist": "C64 M C128 M C256 F32",
    "cifar": "C64 C64 M C128 C128 M C256 C256",
    "stl10": "C64 C64 M C128 C128 M C256 C256 M C256 C256",
}


class ConvNet(nn.Sequential):
    """A convolutional network from a line of text.

    Parameters
    ----------
    spec : str
        A name of `CONVOLUTIONS`, or layers: ``Cn`` a 3x3 convolution with n filters, padding 1 and
        ReLU, ``M`` a 2x2 max-pooling, ``Fn`` a dense layer of n with ReLU.
    image_shape : tuple of int
        (channels, height, width).
    n_out : int
        Width of the dense layer that ends the network.

    Raises
    ------
    ValueError
        If the text cannot be read, or pools more often than the image can be halved.
    """

    def __init__(self, spec, image_shape, n_out):
        channels, height, width = image_shape
        dense, layers = False, []
        for token in CONVOLUTIONS.get(spec, spec).split():
            if token == "M" and not dense and min(height, width) > 1:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            elif (n := _layer_width(token, "C")) and not dense:
                layers += [nn.Conv2d(channels, n, 3, padding=1), nn.ReLU(inplace=True)]
                channels = n
            elif n := _layer_width(token, "F"):
                layers += [] if dense else [nn.Flatten()]
                n_in = channels if dense else channels * height * width
                layers += [nn.Linear(n_in, n), nn.ReLU(inplace=True)]
                dense, channels = True, n
            else:
                raise ValueError(
                    f"network={spec!r} cannot be read at {token!r} for images of shape "
                    f"{tuple(image_shape)}. Use a name out of {sorted(CONVOLUTIONS)}, or layers "
                    "such as 'C32 M C64 F32': Cn convolutes, M halves height and width, Fn is "
                    "dense and comes last."
                )
        layers += [] if dense else [nn.Flatten()]
        layers.append(nn.Linear(channels if dense else channels * height * width, n_out))
        super().__init__(*layers)


def _layer_width(token, kind):
    """The number behind a letter: ``'C64'`` -> 64; 0 for anything else."""
    return int(token[1:]) if token[:1] == kind and token[1:].isdigit() else 0


# --- Scaling ---------------------------------------------------------------------------


class Standardizer(nn.Module):
    """Centre the data and divide by one number, so that a feature has unit variance on average.

    One number for all features: Euclidean clusters stay what they are.

    Parameters
    ----------
    n_features : int
    per_feature : bool, default=False
        Divide each feature by its own deviation instead.

    Attributes
    ----------
    mean : Tensor of shape (n_features,)
    scale : Tensor of shape () or (n_features,)
    """

    def __init__(self, n_features, per_feature=False):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features if per_feature else ()))

    def fit(self, mean, variances):
        """Set the buffers from `Rows.moments`; a constant feature is not rescaled."""
        self.mean.copy_(mean)
        deviation = (variances if self.scale.dim() else variances.mean()).sqrt()
        # The computed deviation of a constant feature is a rounding error of its mean.
        size = mean.abs() if self.scale.dim() else mean.abs().max()
        constant = deviation <= 10 * torch.finfo(variances.dtype).eps * size
        self.scale.copy_(torch.where(constant, 1.0, deviation))
        return self

    def fit_limits(self, low, high):
        """Set the buffers so that values from ``low`` to ``high`` become 0 to 1."""
        self.mean.fill_(low)
        self.scale.fill_(high - low or 1.0)
        return self

    def forward(self, x):
        return (x - self.mean) / self.scale

    def inverse(self, x):
        """Back to the units of the data."""
        return x * self.scale + self.mean


class FeatureScaler(Standardizer):
    """Divide each feature by its deviation, or each row by its norm.

    Parameters
    ----------
    n_features : int
    normalize : bool, default=False
        Whether to divide rows by their norms instead of features by their deviations.
    """

    def __init__(self, n_features, normalize=False):
        super().__init__(n_features, per_feature=True)
        self.normalize = normalize

    def forward(self, x):
        if not self.normalize:
            return super().forward(x)
        # Divide by the largest value first: squares of 1e30 overflow in float32, of 1e-20 vanish.
        size = x.abs().amax(dim=1, keepdim=True)
        return nn.functional.normalize(x / torch.where(size > 0, size, 1.0), dim=1)

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
        self.inverse_matrix.copy_(inv(matrix))
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


def materialize(module, generator, scheme="glorot"):
    """Give a module from `build_on_meta` memory on the CPU and weights from ``generator``."""
    if any(
        buffer.is_meta and not _resettable(module, name) for name, buffer in module.named_buffers()
    ):
        raise ValueError(
            f"{type(module).__name__} registers buffers, which a network built by a callable "
            "cannot keep. Compute them in forward, or pass an nn.Module instance instead."
        )
    # In float32, so that the same numbers are drawn whatever torch's default dtype.
    return init_weights(module.float().to_empty(device="cpu"), generator, scheme)


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
        nn.Module`` is called under the meta device; its lazy layers are given their shapes. A
        module is copied, weights and all.
    sizes : tuple of int
        Widths of input, hidden layers and output. That of the input may be a shape, such as
        (channels, height, width), to which rows are unfolded.
    name : str
        Name of the parameter, for messages.

    Returns
    -------
    nn.Module

    Raises
    ------
    TypeError
        If a callable gives no module.
    ValueError
        If a module has lazy layers, whose weights only its first call would draw.
    """
    if spec is None:
        return build_on_meta(lambda: MLP(sizes))
    if isinstance(spec, nn.Module):
        if _is_lazy(spec):
            raise ValueError(
                f"{name} has lazy layers, which have no weights until they are called. Call it on "
                "a batch first, or pass a callable (n_in, n_out) -> nn.Module that builds it."
            )
        return copy.deepcopy(spec)
    module = build_on_meta(lambda: spec(sizes[0], sizes[-1]))
    if isinstance(module, nn.Module) and not is_meta(module):
        return copy.deepcopy(module)  # the user's own module is never trained in place
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"{name} must return a torch.nn.Module when called with (n_in, n_out) = "
            f"({sizes[0]}, {sizes[-1]}); got {type(module).__name__}."
        )
    if _is_lazy(module):
        _call(module, sizes[0], name, device="meta")
    return module


def _is_lazy(module):
    tensors = itertools.chain(module.parameters(), module.buffers())
    return any(nn.parameter.is_lazy(tensor) for tensor in tensors)


def trainable(module):
    """Parameters of a module that are not frozen (``requires_grad``): tuple of Parameter."""
    return tuple(p for p in module.parameters() if p.requires_grad)


def is_meta(module):
    """Whether a module is on the meta device and waits for `materialize`."""
    return any(p.is_meta for p in module.parameters())


def check_layer_sizes(sizes, name="hidden_layer_sizes"):
    """Raise ValueError unless the parameter ``name`` holds positive integers, or nothing."""
    if not all(isinstance(size, Integral) and size >= 1 for size in sizes):
        raise ValueError(
            f"{name} must hold integers >= 1; got {sizes!r}. An empty tuple makes the "
            "network linear."
        )


def check_shapes(module, n_in, n_out, name):
    """Raise ValueError unless ``module`` maps a batch (2, n_in) to (2, n_out)."""
    if any(isinstance(m, BATCH_NORM) and not m.track_running_stats for m in module.modules()):
        raise ValueError(
            f"{name} has batch normalisation without running statistics: what it makes of a row "
            "depends on the other rows. Leave track_running_stats=True, or use nn.LayerNorm."
        )
    # The module is checked in the dtype of its weights, in which it will be used.
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    found = _call(module, n_in, name, dtype=dtype)
    shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
    if shape != (2, n_out):
        raise ValueError(
            f"{name} must map a batch of shape {_batch_of_two(n_in)} to (2, {n_out}); it gave "
            f"{shape}. Check its sizes against those of the data and of what it is to give."
        )


def _batch_of_two(n_in):
    return (2, *n_in) if isinstance(n_in, tuple) else (2, n_in)


def _call(module, n_in, name, **options):
    """Apply a module of the user to two rows of zeros, in eval mode, without gradients."""
    mode = module.training
    try:
        with torch.no_grad():
            return module.eval()(torch.zeros(_batch_of_two(n_in), **options))
    except Exception as error:  # whatever the user's code raises
        raise ValueError(
            f"{name} cannot be applied to a batch of shape {_batch_of_two(n_in)}: {error}"
        ) from error
    finally:
        module.train(mode)


# --- Layers that behave differently in training ----------------------------------------


class SeededDropout(nn.Module):
    """A dropout layer that draws from a generator instead of torch's global one.

    It draws on the CPU, so that every device drops the same.

    Parameters
    ----------
    layer : nn.Module
        Dropout layer of torch, of any kind.
    generator : torch.Generator
        Generator on the CPU.
    """

    # Limit of SELU for very negative values, by which alpha dropout replaces dropped values.
    ALPHA = -1.7580993408473766

    def __init__(self, layer, generator):
        super().__init__()
        self.p = layer.p
        self.by_channel = not isinstance(layer, (nn.Dropout, nn.AlphaDropout))
        self.dropped = (
            self.ALPHA if isinstance(layer, (nn.AlphaDropout, nn.FeatureAlphaDropout)) else 0.0
        )
        # A function, which is not copied with the module: copies draw from the same generator.
        self.draw = lambda shape: torch.rand(shape, generator=generator, dtype=torch.float32)

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        shape = (*x.shape[:2], *[1] * (x.dim() - 2)) if self.by_channel else x.shape
        kept = (self.draw(shape) >= self.p).to(x.device)
        x = torch.where(kept, x, self.dropped)
        if not self.dropped:
            return x / (1 - self.p) if self.p < 1 else x
        share = (1 - self.p) * (1 + self.p * self.dropped**2)  # the variance that is left
        return (x - self.p * self.dropped) * share**-0.5 if share else x


def seed_dropout(module, generator):
    """Let the dropout layers of a network draw from a generator, in place."""
    for parent in list(module.modules()):
        # named_children would yield a layer that is used twice only once.
        for name, child in list(parent._modules.items()):
            if type(child) in DROPOUTS:  # a subclass may do something else
                setattr(parent, name, SeededDropout(child, generator))
    return module


def needs_several_rows(module):
    """Whether a network has layers that a batch of one row has no statistics for."""
    return any(isinstance(m, BATCH_NORM) for m in module.modules())
