"""The tracked mixture, the critic, and the network that has them beside an autoencoder."""

import itertools
import math
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.nn.functional import leaky_relu, linear

from deepmix.autoencoder import AutoencoderNetwork
from deepmix.gaussian_mixture import Mixture, MixtureModule, maximize
from deepmix.gaussians import GaussianStatistics, hard_statistics
from deepmix.linalg import spectral_norm
from deepmix.networks import MLP, Whitener, build_on_meta

# A component whose share is below FEW of the mean share keeps its mean, and no weight falls below
# LEAST_WEIGHT of the mean. WIDENING is the share of the codes' variance that is added to that of
# the components, LEAST_VARIANCE the least that the codes' variance counts for.
FEW, LEAST_WEIGHT, WIDENING, LEAST_VARIANCE = 0.03, 0.1, 1e-3, 1e-6


def component(z, mixture, literal=False):
    r"""Eq. 5: the component of highest posterior, of a mixture with one spherical covariance.

    .. math:: \zeta_i = \arg\max_k \; \ln \psi_k - \tfrac1{2 \sigma^2} \lVert z_i - \eta_k \rVert^2

    Eq. 22 as printed lacks the precision: ``literal`` takes the variance as one, so that the
    weights outweigh the distances wherever codes are closer than that.

    Parameters
    ----------
    z : Tensor of shape (B, d)
    mixture : Mixture
        Mixture of type 'tied_spherical'.
    literal : bool, default=False

    Returns
    -------
    Tensor of int64 of shape (B,)
    """
    means = mixture.means
    scaled = means if literal else means / mixture.covariances
    bias = mixture.weights.log() - 0.5 * (scaled * means).sum(dim=1)
    return torch.addmm(bias, z, scaled.T).argmax(dim=1)


def hard_mixture(z, labels, weight, before, equal_weights=False):
    r"""Eqs. 20, 21 and 23 with one spherical covariance, and two guards.

    .. math:: \eta_k = \frac{\sum_i w_i \zeta_{ik} z_i}{\sum_i w_i \zeta_{ik}}, \qquad
        \psi_k = \frac{\sum_i w_i \zeta_{ik}}{\sum_i w_i}, \qquad
        \sigma^2 = \frac{\sum_{i,k} w_i \zeta_{ik} \lVert z_i - \eta_k \rVert^2}{d \sum_i w_i}

    A component of hardly any row keeps its mean, and no weight falls so low that a component
    could not come back. Where codes form no clusters free weights still let one component take
    most of them: ``equal_weights`` leaves out Eq. 23.

    Parameters
    ----------
    z : Tensor of float64 of shape (n, d)
    labels : Tensor of shape (n,)
    weight : Tensor of float64 of shape (n,)
    before : Mixture
        Current mixture, in float64, from which components of hardly any row keep their means.
    equal_weights : bool, default=False

    Returns
    -------
    Mixture
        Mixture of type 'tied_spherical'.
    """
    n_clusters = len(before.weights)
    sums = hard_statistics(z, labels, weight, n_clusters, "spherical")
    sums = GaussianStatistics(sums.nk, sums.first, sums.second.sum())
    center, total = sums.first.sum(dim=0) / weight.sum(), weight.sum() * z.shape[1]
    variance = (sums.second / total - center.square().mean()).clamp_min(LEAST_VARIANCE)
    new = maximize(sums, "tied_spherical", reg_covar=WIDENING * variance)
    enough = new.weights > FEW / n_clusters
    weights = new.weights.clamp_min(LEAST_WEIGHT / n_clusters)
    weights = torch.ones_like(weights) if equal_weights else weights
    means = torch.where(enough[:, None], new.means, before.means)
    return replace(new, weights=weights / weights.sum(), means=means)


def sweep(z, weight, mixture, memory, literal=False, equal_weights=False):
    r"""One sweep of hard EM over a pool of codes, of which the old values keep a share.

    .. math:: \theta \leftarrow m \, \theta + (1 - m) \, \theta^*(z)

    Parameters
    ----------
    z : Tensor of shape (n, d)
    weight : Tensor of shape (n,)
    mixture : Mixture
        Current mixture, of type 'tied_spherical'.
    memory : float
        :math:`m`.
    literal, equal_weights : bool, default=False
        As for `component` and `hard_mixture`.

    Returns
    -------
    Mixture
        In float64.
    """
    labels = component(z, mixture, literal)
    before = mixture.map(torch.Tensor.double)
    after = hard_mixture(z.double(), labels, weight.double(), before, equal_weights)
    return before.map(lambda old, new: memory * old + (1 - memory) * new, after)


class Critic(nn.Module):
    """Says how much a code looks like a draw from the mixture: (B, d) -> (B, n_out).

    Parameters
    ----------
    sizes : sequence of int
        Width of the input, of each hidden layer, and of the output.
    activation : {'relu', 'tanh'}
        'relu' is leaky here.
    spectral_norm : bool
        Whether each layer is divided by its largest singular value.
    """

    def __init__(self, sizes, activation="relu", spectral_norm=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.activation, self.spectral_norm = activation, spectral_norm

    def forward(self, z):
        for i, layer in enumerate(self.layers):
            if i:
                z = leaky_relu(z, 0.2) if self.activation == "relu" else z.tanh()
            weight = layer.weight
            if self.spectral_norm:
                weight = weight / spectral_norm(weight)
            z = linear(z, weight, layer.bias)
        return z


def dense_network(n_in, n_out, hidden_layer_sizes, activation, bounded=False):
    """Dense layers with ReLU between them; or with tanh, after the last too if ``bounded``."""
    sizes = (n_in, *hidden_layer_sizes, n_out)
    if activation == "relu":
        return MLP(sizes, negative_slope=0.0)
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*(layers if bounded else layers[:-1]))


def coders(hidden_layer_sizes, activation, encoder=None, decoder=None):
    """What `make_coder` makes encoder and decoder of: what the user gives, or dense networks."""
    own = partial(dense_network, activation=activation)
    # Not `encoder or ...`: the truth value of a module is that of its length, if it has one.
    if encoder is None:
        encoder = partial(own, hidden_layer_sizes=hidden_layer_sizes, bounded=True)
    if decoder is None:
        decoder = partial(own, hidden_layer_sizes=hidden_layer_sizes[::-1])
    return {"encoder": encoder, "decoder": decoder}


class DCANNetwork(AutoencoderNetwork):
    """An autoencoder, the mixtures of its codes, and what the divergence needs.

    Attributes
    ----------
    scaler : Standardizer
        Scaling of the data.
    autoencoder : Autoencoder
    whitener : Whitener
        Map of the codes that makes their mean zero and their variance one on average.
    tracked : Mixture
        The mixture that training follows: one spherical covariance. Kept in buffers.
    mixture : MixtureModule
        The mixture that predictions are made from, covariances in full whatever their type.
    critic : Critic or None
        The critic, for ``divergence='js'``.
    deviation : MLP or None
        Log-deviations of codes, for ``divergence='kl'``.
    error_unit, variance_unit : Tensor of shape ()
        Error of the autoencoder alone and variance of the first components, which the losses are
        measured in.
    """

    def __init__(
        self,
        n_features,
        n_clusters,
        latent_dim,
        hidden_layer_sizes,
        encoder=None,
        decoder=None,
        divergence="js",
        conditional=True,
        critic_hidden_layer_sizes=(64,),
        activation="relu",
        spectral_norm=False,
    ):
        spec = coders(hidden_layer_sizes, activation, encoder, decoder)
        super().__init__(n_features, latent_dim, hidden_layer_sizes, **spec)
        self.whitener = Whitener(latent_dim)
        self.register_buffer("tracked_weights", torch.full((n_clusters,), 1.0 / n_clusters))
        self.register_buffer("tracked_means", torch.zeros(n_clusters, latent_dim))
        self.register_buffer("tracked_variance", torch.ones(()))
        self.mixture = MixtureModule(latent_dim, n_clusters)
        self.conditional = conditional
        self.critic = self.deviation = None
        sizes = (latent_dim, *critic_hidden_layer_sizes)
        if divergence == "js":
            self.critic = build_on_meta(lambda: Critic((*sizes, 1), activation, spectral_norm))
        elif divergence == "kl":
            self.deviation = build_on_meta(lambda: MLP((*sizes, latent_dim)))
        self.register_buffer("error_unit", torch.ones(()))
        self.register_buffer("variance_unit", torch.ones(()))

    @property
    def width(self):
        return max(super().width, self.mixture.means.numel())

    def encode(self, x):
        """Whitened codes: (B, n_features) -> (B, latent_dim)."""
        return self.whitener(super().encode(x))

    def decode(self, z):
        """Rows in the units of the data: (B, latent_dim) -> (B, n_features)."""
        return super().decode(self.whitener.inverse(z))

    @property
    def tracked(self):
        buffers = self.tracked_weights, self.tracked_means, self.tracked_variance
        return Mixture(*buffers, "tied_spherical")

    @torch.no_grad()
    def track(self, mixture):
        """Take new values of the mixture that training follows."""
        for buffer, value in zip(self.tracked.tensors, mixture.tensors, strict=True):
            buffer.copy_(value)

    def features(self, z, labels):
        """Codes as the critic sees them: (B, latent_dim) -> (B, latent_dim).

        If conditional, relative to their own component and in units of its deviation.
        """
        if not self.conditional:
            return z
        return (z - self.tracked_means[labels]) * self.tracked_variance.rsqrt()

    def judge(self, z):
        """The critic's logit of each code: (B, latent_dim) -> (B,)."""
        return self.critic(self.features(z, component(z, self.tracked))).squeeze(1)

    def resp(self, x):
        """Responsibilities: (B, n_features) -> (B, n_clusters)."""
        return self.mixture.log_joint(self.encode(x)).softmax(dim=1)

    def log_density(self, x):
        """Log density of the codes of rows: (B, n_features) -> (B,)."""
        return torch.logsumexp(self.mixture.log_joint(self.encode(x)), dim=1)

    @torch.no_grad()
    def normalize(self, mean, variance):
        """Move codes of this mean and mean variance to zero and one, and the mixture with them."""
        whitener, tracked = self.whitener, self.tracked
        scale = math.sqrt(variance) if variance > torch.finfo(torch.float32).tiny else 1.0
        origin = whitener.mean + mean.to(whitener.mean) @ whitener.inverse_matrix
        whitener.fit(origin, whitener.matrix / scale)
        means = (tracked.means - mean.to(tracked.means)) / scale
        self.track(replace(tracked, means=means, covariances=tracked.covariances / scale**2))
        self.variance_unit.div_(scale**2)
