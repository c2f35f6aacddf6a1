"""Parameters of an estimator, drawn from its own ``_parameter_constraints``.

Lengths of training are kept short, and sizes small. Everything else may be anything that the
constraint lets pass, its ends and extremes too. What a constraint does not tell (how long an array
has to be, what a callable gets) is in the tables `ARRAYS`, `CALLABLES` and `TEXTS`.
"""

import math
from dataclasses import dataclass
from numbers import Integral
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.utils._param_validation import Interval, StrOptions
from torch import nn

# Expressions of `Made` name them.
from deepmix import DeepDPM
from deepmix.augmentation import ImageAugmentation, VectorAugmentation  # noqa: F401

# --- Values that have no short repr ----------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A Python expression in place of its value, so that a case can be printed and pasted."""

    expression: str

    def make(self):
        return eval(self.expression, {**globals(), "nan": math.nan, "inf": math.inf})

    def __repr__(self):
        return self.expression


def array(values, dtype=None):
    values = np.asarray(values, dtype=dtype)
    return Made(f"np.array({values.tolist()}, dtype='{values.dtype}')")


# --- Networks of a user ----------------------------------------------------------------


class NotFinite(nn.Module):
    def forward(self, x):
        return x / 0.0


class Buffered(nn.Module):
    """A linear layer with a buffer that cannot be restored from nothing."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)
        self.register_buffer("shift", torch.ones(n_out))

    def forward(self, x):
        return self.linear(x) + self.shift


def frozen(n_in, n_out):
    return nn.Linear(n_in, n_out).requires_grad_(False)


LAYERS = {
    "linear": lambda i, o: [nn.Linear(i, o)],
    "no bias": lambda i, o: [nn.Linear(i, 3), nn.ReLU(inplace=True), nn.Linear(3, o, bias=False)],
    "batch norm": lambda i, o: [nn.Linear(i, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, o)],
    "batch norm first": lambda i, o: [nn.BatchNorm1d(i), nn.Linear(i, o)],
    "batch norm last": lambda i, o: [nn.Linear(i, o), nn.BatchNorm1d(o)],
    "untracked batch norm": lambda i, o: [
        nn.Linear(i, o),
        nn.BatchNorm1d(o, track_running_stats=False),
    ],
    "layer norm": lambda i, o: [nn.Linear(i, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, o)],
    "group norm": lambda i, o: [nn.Linear(i, 4), nn.GroupNorm(2, 4), nn.SiLU(), nn.Linear(4, o)],
    "dropout": lambda i, o: [nn.Linear(i, 4), nn.Dropout(0.5), nn.Linear(4, o)],
    "lazy": lambda i, o: [nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(o)],
    "frozen": lambda i, o: [frozen(i, 3), nn.Linear(3, o)],
    "all frozen": lambda i, o: [frozen(i, o)],
    "float64": lambda i, o: [nn.Linear(i, o, dtype=torch.float64)],
    "weight norm": lambda i, o: [nn.utils.parametrizations.weight_norm(nn.Linear(i, o))],
    "spectral norm": lambda i, o: [nn.utils.parametrizations.spectral_norm(nn.Linear(i, o))],
    "buffer": lambda i, o: [Buffered(i, o)],
    "constant": lambda i, o: [nn.Linear(i, o), nn.Hardtanh(0.0, 1e-12)],
    "not finite": lambda i, o: [nn.Linear(i, o), NotFinite()],
    "one too many": lambda i, o: [nn.Linear(i, o + 1)],
    "nothing": lambda i, o: [],
}


REFUSED_LAYERS = ("float64", "buffer", "not finite", "one too many", "nothing")


def network(name):
    """A callable ``(shape, n_out) -> nn.Module`` as for ``encoder``, ``decoder``, ``network``."""
    return UserNetwork(name)


@dataclass(frozen=True)
class UserNetwork:
    name: str

    def __call__(self, shape, n_out):
        n_in = math.prod(shape) if isinstance(shape, tuple) else shape
        return nn.Sequential(nn.Flatten(), *LAYERS[self.name](n_in, n_out))


def module(name, n_in, n_out):
    """Such a network with weights, the same ones each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UserNetwork(name)(n_in, n_out)


def no_module(n_in, n_out):
    return "a network"


# --- Other callables of a user ---------------------------------------------------------


def first_rows(X, n_clusters, random_state):
    return X[:n_clusters]


def nan_centers(X, n_clusters, random_state):
    return np.full((n_clusters, X.shape[1]), np.nan)


def mirrored(batch):
    return batch.flip(-1)


def doubled_in_place(batch):
    return batch.mul_(2.0)


def narrower(batch):
    return batch[:, :0]


# --- Tables: what constraints do not tell ----------------------------------------------

# Numbers of epochs, restarts and so on, most of what a fit costs: the first ones are the likelier.
LENGTHS = {
    "max_iter": (1, 2, 0, 4),
    "pretrain_max_iter": (1, 2, 0, 3),
    "clustering_max_iter": (1, 2, 0, 4),
    "n_alternations": (0, 1, 2),
    "n_init": (1, 2, 3),
    "readout_n_init": (1, 2),
    "split_merge_every": (3, 1, 2, 6),
    "freeze": (0, 1, 3),
}
# A critic draws as much noise as a batch may have rows.
SIZES = {"n_clusters": 8, "n_clusters_init": 8, "latent_dim": 6, "batch_size": 10_000}
LAYER_SIZES = [(4,), (4,), (), (3, 2), [5], (1,), Made("np.array([4, 3])"), (6, 6, 6)]
BAD_LAYER_SIZES = [(0,), (2.5,), (-1,), ("4",), [[4]], Made("np.array([4.0])"), (None,)]


def layer_sizes(rng, context):
    return pick(rng, BAD_LAYER_SIZES if rng.random() < 0.04 else LAYER_SIZES)


def concentrations(rng, context):
    k = context["n_clusters"]
    good = [np.full(k, 1.5), np.arange(1, k + 1), 10.0 ** rng.uniform(-20, 20, k), np.ones(k)]
    bad = [np.ones(k + 1), np.zeros(k), -np.ones(k), np.full(k, np.nan), np.ones((k, 1))]
    return array(pick(rng, bad if rng.random() < 0.2 else good))


def shares(rng, context):
    k = context["n_clusters"]
    random = rng.dirichlet(np.ones(k))
    uneven = 10.0 ** -np.arange(0, 12 * k, 12.0)
    good = [np.full(k, 1 / k), random, uneven / uneven.sum()]
    bad = [np.ones(k), np.eye(k)[0], np.full(k + 1, 1 / (k + 1)), np.full(k, np.nan), [["a"] * k]]
    return array(pick(rng, bad if rng.random() < 0.2 else good))


def latent_dim(context):
    """Dimension of the codes as drawn, or what AECM takes."""
    given = context.get("latent_dim")
    return given if isinstance(given, int) else max(10, context["n_clusters"])


def scale_matrices(rng, context):
    d = latent_dim(context) if "latent_dim" in context else context["n_features"]
    root = rng.normal(size=(d, d))
    good = [
        10.0 ** rng.uniform(-3, 1, d),
        root @ root.T + np.eye(d) if d < 10 else np.eye(d),
        np.full(d, 1e-30),
        np.full(d, 1e30),
        np.eye(d, dtype=int),
    ]
    bad = [np.zeros(d), -np.eye(d), np.ones((d, d)), np.ones(d + 1), np.full(d, np.nan)]
    return array(pick(rng, bad if rng.random() < 0.25 else good))


def centers(rng, context):
    shape = context["n_clusters"], context["n_features"]
    good = [rng.normal(size=shape), np.zeros(shape), np.full(shape, 1e20), np.ones(shape, int)]
    bad = [np.full(shape, np.nan), np.zeros((shape[0] + 1, shape[1])), np.zeros(shape[1])]
    return array(pick(rng, bad if rng.random() < 0.25 else good))


ARRAYS = {
    "hidden_layer_sizes": layer_sizes,
    "critic_hidden_layer_sizes": layer_sizes,
    "concentration": concentrations,
    "weights": shares,
    "prior_scale": scale_matrices,
    "init": centers,
}


def user_networks(rng, context):
    usual = [name for name in LAYERS if name not in REFUSED_LAYERS]
    name = pick(rng, REFUSED_LAYERS if rng.random() < 0.1 else usual)
    form = rng.random()
    if form < 0.8:
        return Made(f"network({name!r})")
    if form < 0.82:
        return Made("no_module")
    n_latent = latent_dim(context)
    sizes = {
        "encoder": (context["n_features"], n_latent),
        "decoder": (n_latent, context["n_features"]),
        "network": (context["n_features"], context["n_clusters"]),
    }
    n_in, n_out = sizes[context["name"]]
    return Made(f"module({name!r}, {n_in}, {n_out})")


def augmentations(rng, context):
    kind = "VectorAugmentation" if context.get("image_shape") is None else "ImageAugmentation"
    views = ["mirrored", "doubled_in_place", "narrower", *2 * ["mirrored"], f"{kind}()"]
    return Made(pick(rng, views))


CALLABLES = {
    "encoder": user_networks,
    "decoder": user_networks,
    "network": user_networks,
    "augmentation": augmentations,
    "init": lambda rng, context: Made(pick(rng, ["first_rows", "first_rows", "nan_centers"])),
}


def augmentation_names(rng, context):
    vectors, images = ["noise", "masking", "mixup"], ["weak", "medium", "strong", "natural"]
    if rng.random() < 0.05:
        return "views"
    return pick(rng, ["auto", *(vectors if context.get("image_shape") is None else images)])


def layers_as_text(rng, context):
    if context.get("image_shape") is None and rng.random() < 0.9:
        return None  # text is for images
    return pick(rng, ["C4 M F8", "C2 F4", "F4", "C2", "C2 M M C2", "X3"])


TEXTS = {
    "device": lambda rng, context: pick(rng, ["auto", "cpu"]),
    "network": layers_as_text,
    "augmentation": augmentation_names,
}


def image_shapes(rng, context):
    d = context["n_features"]
    if rng.random() < 0.05:
        return pick(rng, [(2, d, 1), (d,), (0, 0, d), (1.0, 1, d)])
    shapes = [(1, 1, d), (1, d, 1)]
    shapes += [(3, side, d // 3 // side) for side in (1, 2, 4) if d % (3 * side) == 0]
    shapes += [(1, side, d // side) for side in (2, 4, 5, 6) if d % side == 0]
    return pick(rng, shapes)


SHAPES = {"image_shape": image_shapes}

# --- Drawing ---------------------------------------------------------------------------


def pick(rng, options):
    """One of some options, unchanged: `Generator.choice` would make arrays of them."""
    return options[int(rng.integers(len(options)))]


def real_number(rng, interval):
    """Inside, at and near the ends, seldom extreme."""
    left, right = interval.left, interval.right
    left, right = (-math.inf if left is None else left), (math.inf if right is None else right)
    ends = [end for end, side in ((left, "left"), (right, "right")) if math.isfinite(end)]
    values = [10.0 ** rng.uniform(-4, 1) for _ in range(8)] + [1, 0.5]
    values += [end for end in ends if end in interval]
    values += [math.nextafter(end, other) for end, other in zip(ends, (right, left))]
    if rng.random() < 0.25:
        values = [1e-300, 1e-30, 1e-12, 1e6, 1e30, 1e300, np.float32(0.1), math.inf]
    values = [value for value in values if value in interval]
    value = pick(rng, values) if values else 0.5 * (left + right)
    return Made(f"np.float32({value})") if isinstance(value, np.float32) else value


def integer(rng, interval, name):
    low = interval.left if interval.closed in ("left", "both") else interval.left + 1
    if name in LENGTHS:
        lengths = LENGTHS[name]
        return lengths[min(int(rng.geometric(0.6)), len(lengths)) - 1]
    high = SIZES.get(name)
    values = [low, low + 1, low + 2, 3, 4, 8, Made("np.int64(2)")]
    values = [*values, 20, 100, high or 10**9]
    return pick(rng, [v for v in values if isinstance(v, Made) or v <= (high or v)])


def draw_from(rng, constraint, name, context):
    """One value that a constraint lets pass."""
    if constraint is None:
        return None
    if isinstance(constraint, Interval):
        integral = constraint.type is Integral
        return integer(rng, constraint, name) if integral else real_number(rng, constraint)
    if isinstance(constraint, StrOptions):
        return pick(rng, sorted(constraint.options))
    if constraint is torch.device:
        return Made("torch.device('cpu')")
    if constraint is DeepDPM:
        return clusterer(rng, context)
    if constraint in (tuple, list):
        return constraint(SHAPES[name](rng, context))
    if isinstance(constraint, str):
        draw = {
            "boolean": lambda: pick(rng, [True, False]),
            "verbose": lambda: pick(rng, [0] * 8 + [1, True]),
            "random_state": lambda: pick(rng, [0, 1, Made("np.random.RandomState(2)")]),
            "array-like": lambda: ARRAYS[name](rng, context),
        }
        return draw[constraint]()
    return (TEXTS if constraint is str else CALLABLES)[name](rng, context)


def usable(constraint, name):
    """Whether a value from a constraint keeps a fit short: 'auto' epochs are a thousand."""
    automatic = isinstance(constraint, StrOptions) and "auto" in constraint.options
    return not (automatic and name in LENGTHS)


def clusterer(rng, context):
    """A clusterer of codes with parameters of its own."""
    n_features = latent_dim(context) if "latent_dim" in context else context["n_features"]
    codes = SimpleNamespace(n=context["n_rows"], d=n_features)
    return Made(f"DeepDPM(**{draw_parameters(DeepDPM, rng, codes)})")


def draw_parameters(cls, rng, data):
    """Parameters that differ from the defaults: lengths always, each other with a chance.

    Parameters
    ----------
    cls : class of an estimator
    rng : numpy.random.Generator
    data : Data
        Says how many clusters there may be, and how long arrays have to be.

    Returns
    -------
    dict
    """
    constraints = cls._parameter_constraints
    number = next((name for name in ("n_clusters", "n_clusters_init") if name in constraints), None)
    n_clusters = int(rng.integers(1, 9))
    if rng.random() < 0.9:
        n_clusters = min(n_clusters, data.n)
    parameters = {} if number is None else {number: n_clusters}
    context = {"n_clusters": n_clusters, "n_features": data.d, "n_rows": data.n}
    share = rng.choice([0.1, 0.3, 0.6])
    # These first: the lengths of others hang on them.
    names = sorted(constraints, key=lambda name: (name not in ("latent_dim", "image_shape"), name))
    for name in names:
        needed = name in LENGTHS or name.endswith("layer_sizes") or name == "random_state"
        needed |= name == "clusterer"  # the default trains to the end
        needed |= name == "network" and context.get("image_shape") is not None  # 'mnist' is large
        if name == number or not (needed or rng.random() < share):
            continue
        context["name"] = name
        allowed = [c for c in constraints[name] if usable(c, name)]
        if name == "clusterer":
            allowed = [DeepDPM]
        parameters[name] = draw_from(rng, pick(rng, allowed), name, context)
        context[name] = parameters[name]
    return parameters
