r"""What DCAN minimises: its losses, its mixture, its critic, its game.

Lim, "Deep clustering using adversarial net based clustering loss", arXiv 2412.08933: the critic's
and the encoder's losses (Eqs. 1 and 13 to 18), the closed forms that they replace (Eqs. 3, 6 and
7), the mixture among the codes (Eqs. 5 and 20 to 23).
"""

import itertools
import math
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import leaky_relu, linear, softplus

from deepmix._torch import full_precision
from deepmix.autoencoder import AutoencoderNetwork
from deepmix.distributions import GaussianStatistics, hard_statistics
from deepmix.gaussian_mixture import (
    GaussianMixtureHead,
    MixtureParameters,
    full_covariances,
    maximize,
)
from deepmix.linalg import spectral_norm
from deepmix.losses import squared_error
from deepmix.networks import (
    MLP,
    Whitener,
    build_on_meta,
    trainable,
)
from deepmix.training import Objective, Phase

# Of the mean share of a component: below the first the component keeps its mean, and no weight
# falls below the second. Share of the codes' variance that is added to that of the components, and
# the least that variance counts for.
FEW, LEAST_WEIGHT, WIDENING, LEAST_VARIANCE = 0.03, 0.1, 1e-3, 1e-6

# Draws of the critic's positives in a step, at most.
MAX_DRAWS = 2**13

# --- Losses ----------------------------------------------------------------------------


def critic_loss(positive, negative, weight, smoothing=0.0):
    r"""Eqs. 1, 13, 15 and 17, with the sign of a loss: what the critic minimises.

    .. math:: -\sum_i w_i \Big( \ln(1 - D(z_i)) + \tfrac1M \sum_m \ln D(z^*_m) \Big),
        \qquad z^*_m \sim p(z \mid \theta^*)

    At its minimum over all *D* the mean over rows is :math:`2 \ln 2 - 2 \, \mathrm{JS}(p \Vert q)`.

    Parameters
    ----------
    positive : Tensor of shape (M,)
        Logits of D for draws from the mixture (T = 1).
    negative : Tensor of shape (B,)
        Logits of D for codes (T = 0).
    weight : Tensor of shape (B,)
        Of the codes; the draws weigh as much together.
    smoothing : float, default=0
        The target of the draws is one less this.

    Returns
    -------
    Tensor of shape ()
    """
    drawn = softplus(-positive)
    if smoothing:
        drawn = (1 - smoothing) * drawn + smoothing * softplus(positive)
    return weight @ softplus(negative) + weight.sum() * drawn.mean()


def encoder_loss(logits, weight, saturating=False):
    r"""Eq. 18, with the sign of a loss, or its form with a gradient that does not vanish.

    .. math:: \sum_i w_i \ln(1 - D(z_i)) \qquad \text{or} \qquad -\sum_i w_i \ln D(z_i)

    The second, which is the default, has the same fixed point; the first is flat where the critic
    is sure, which is where codes most need to move.

    Parameters
    ----------
    logits : Tensor of shape (B,)
        Of D, for codes.
    weight : Tensor of shape (B,)
    saturating : bool, default=False

    Returns
    -------
    Tensor of shape ()
    """
    return -(weight @ softplus(logits)) if saturating else weight @ softplus(-logits)


def euclidean_loss(z, centers, weight):
    r"""Eqs. 3 and 7.

    .. math:: \sum_i w_i \, \tfrac12 \lVert z_i - \eta^*_i \rVert^2

    Parameters
    ----------
    z : Tensor of shape (B, d)
    centers : Tensor of shape (B, d)
        Mean of each row's own component.
    weight : Tensor of shape (B,)

    Returns
    -------
    Tensor of shape ()
    """
    return 0.5 * squared_error(z, centers, weight)


def kl_loss(z, log_deviation, centers, variance, weight):
    r"""Eq. 6: from each row's own component to the Gaussian that the encoder gives for the row.

    .. math:: \sum_i w_i \sum_j \Big( \ln \sigma_{ij} + \tfrac12 \ln \tau
        + \frac{\tau^{-1} + (\eta^*_{ij} - \mu_{ij})^2}{2 \sigma_{ij}^2} - \tfrac12 \Big)

    Eq. 9 prints :math:`\ln \tau` without its half.

    Parameters
    ----------
    z, log_deviation : Tensor of shape (B, d)
        :math:`\mu` and :math:`\ln \sigma`.
    centers : Tensor of shape (B, d)
    variance : Tensor of shape ()
        :math:`1 / \tau`.
    weight : Tensor of shape (B,)

    Returns
    -------
    Tensor of shape ()
    """
    ratio = (variance + (centers - z).square()) * (-2 * log_deviation).exp()
    each = log_deviation - 0.5 * variance.log() + 0.5 * ratio - 0.5
    return weight @ each.sum(dim=1)


# --- Mixture ---------------------------------------------------------------------------


def component(z, weights, means, variance, literal=False):
    r"""Eq. 5: the component of highest posterior, of a mixture with one spherical covariance.

    .. math:: \zeta_i = \arg\max_k \; \ln \psi_k - \tfrac1{2 \sigma^2} \lVert z_i - \eta_k \rVert^2

    Eq. 22 as printed lacks the precision: ``literal`` takes the variance as one, so that the
    weights outweigh the distances wherever codes are closer than that.

    Parameters
    ----------
    z : Tensor of shape (B, d)
    weights : Tensor of shape (K,)
    means : Tensor of shape (K, d)
    variance : Tensor of shape ()
    literal : bool, default=False

    Returns
    -------
    Tensor of int64 of shape (B,)
    """
    scaled = means if literal else means / variance
    bias = weights.log() - 0.5 * (scaled * means).sum(dim=1)
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
    before : tuple
        Weights, means and variance until now.
    equal_weights : bool, default=False

    Returns
    -------
    weights : Tensor of shape (K,)
    means : Tensor of shape (K, d)
    variance : Tensor of shape ()
    """
    n_clusters = len(before[0])
    sums = hard_statistics(z, labels, weight, n_clusters, "spherical")
    sums = GaussianStatistics(sums.nk, sums.first, sums.second.sum())
    center, total = sums.first.sum(dim=0) / weight.sum(), weight.sum() * z.shape[1]
    variance = (sums.second / total - center.square().mean()).clamp_min(LEAST_VARIANCE)
    new = maximize(sums, "tied_spherical", reg_covar=WIDENING * variance)
    enough = new.weights > FEW / n_clusters
    weights = new.weights.clamp_min(LEAST_WEIGHT / n_clusters)
    weights = torch.ones_like(weights) if equal_weights else weights
    means = torch.where(enough[:, None], new.means, before[1])
    return weights / weights.sum(), means, new.covariances


class TiedMixture(nn.Module):
    """The mixture that training follows: one spherical covariance.

    Attributes
    ----------
    weights : Tensor of shape (K,)
    means : Tensor of shape (K, d)
    variance : Tensor of shape ()
    """

    def __init__(self, n_clusters, n_dimensions):
        super().__init__()
        self.register_buffer("weights", torch.full((n_clusters,), 1.0 / n_clusters))
        self.register_buffer("means", torch.zeros(n_clusters, n_dimensions))
        self.register_buffer("variance", torch.ones(()))

    def values(self):
        """Copies of weights, means and variance, in float64."""
        return tuple(v.double().clone() for v in (self.weights, self.means, self.variance))

    def set(self, weights, means, variance):
        """Take new values."""
        self.weights.copy_(weights)
        self.means.copy_(means)
        self.variance.copy_(variance)

    def assign(self, z, literal=False):
        """Own component of each code: (B, d) -> (B,)."""
        return component(z, self.weights, self.means, self.variance, literal)

    def residual(self, z, labels):
        """Codes relative to their own component, in units of its deviation: (B, d) -> (B, d)."""
        return (z - self.means[labels]) * self.variance.rsqrt()

    @torch.no_grad()
    def refresh(self, z, weight, memory, literal=False, equal_weights=False):
        """One sweep of hard EM over a pool of codes, of which the old values keep a share."""
        before = self.values()
        labels, z = self.assign(z, literal), z.double()
        after = hard_mixture(z, labels, weight.double(), before, equal_weights)
        self.set(*(memory * a + (1 - memory) * b for a, b in zip(before, after, strict=True)))


# --- Networks --------------------------------------------------------------------------


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
        Of the data.
    autoencoder : Autoencoder
    whitener : Whitener
        Of the codes: makes their mean zero and their variance one on average.
    tracked : TiedMixture
    mixture : GaussianMixtureHead
        That predictions are read from, covariances in full whatever their type; ``exact`` are
        its `MixtureParameters`, of their type.
    critic : Critic or None
        Of ``divergence='js'``.
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
        self.tracked = TiedMixture(n_clusters, latent_dim)
        self.mixture = GaussianMixtureHead(latent_dim, n_clusters)
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

    def features(self, z, labels):
        """What the critic sees of codes: (B, latent_dim) -> (B, latent_dim)."""
        return self.tracked.residual(z, labels) if self.conditional else z

    def judge(self, z):
        """The critic's logit of each code: (B, latent_dim) -> (B,)."""
        return self.critic(self.features(z, self.tracked.assign(z))).squeeze(1)

    def resp(self, x):
        """Responsibilities: (B, n_features) -> (B, n_clusters)."""
        return self.mixture.log_joint(self.encode(x)).softmax(dim=1)

    def log_density(self, x):
        """Of the codes of rows: (B, n_features) -> (B,)."""
        return torch.logsumexp(self.mixture.log_joint(self.encode(x)), dim=1)

    def set_mixture(self, parameters):
        """Let predictions be those of `MixtureParameters` of any type."""
        covariances = full_covariances(parameters)
        self.mixture.set(parameters.weights, parameters.means, covariances)
        self.mixture.exact = parameters

    def publish(self):
        """Let predictions be those of the tracked mixture."""
        self.set_mixture(MixtureParameters(*self.tracked.values(), "tied_spherical"))

    @torch.no_grad()
    def normalize(self, mean, variance):
        """Move codes of this mean and mean variance to zero and one, and the mixture with them."""
        whitener, tracked = self.whitener, self.tracked
        scale = math.sqrt(variance) if variance > torch.finfo(torch.float32).tiny else 1.0
        origin = whitener.mean + mean.to(whitener.mean) @ whitener.inverse_matrix
        whitener.fit(origin, whitener.matrix / scale)
        means = (tracked.means - mean.to(tracked.means)) / scale
        tracked.set(tracked.weights, means, tracked.variance / scale**2)
        self.variance_unit.div_(scale**2)


# --- Training --------------------------------------------------------------------------


class Settings(NamedTuple):
    """What the objectives have in common: parameters of `DCAN` by their names there."""

    clustering_weight: float
    warm_up: int
    reconstruction_weight: float
    update_every: int
    pool_size: int
    memory: float
    literal: bool
    equal_weights: bool
    saturating: bool
    label_smoothing: float
    batch_size: int


class LatentObjective(Objective):
    """Codes near their own component, and reconstruction; the mixture follows the codes.

    Parameters
    ----------
    network : DCANNetwork
    rows : Rows
        Which the pool is drawn from.
    settings : Settings
    generator : torch.Generator
        Draws the pool, and positives.
    """

    def __init__(self, network, rows, settings, generator):
        self.network, self.rows = network, rows
        self.settings, self.generator = settings, generator
        self.n_steps = 0
        self.watch = ("clustering", "reconstruction")[: 1 + bool(settings.reconstruction_weight)]

    def phases(self):
        return (Phase(self._trained(), self.step),)

    def _trained(self):
        coder, head = self.network.autoencoder, self.network.deviation
        coder = coder if self.settings.reconstruction_weight else coder.encoder
        return (*trainable(coder), *(() if head is None else trainable(head)))

    def step(self, batch, index, weight):
        x, code, z, labels = self._encode(batch)
        with full_precision(x.device):
            clustering = self.clustering(z, self.network.tracked.means[labels], weight)
        return self._terms(clustering, x, code, z, weight)

    def clustering(self, z, centers, weight):
        """Distance of codes from the means of their components, in a unit that has no scale."""
        raise NotImplementedError

    def _encode(self, batch):
        """Scaled rows, codes as the decoder wants them, codes as the mixture does, components."""
        network, every = self.network, self.settings.update_every
        if every and self.n_steps and self.n_steps % every == 0:
            self.refresh()
        self.n_steps += 1
        x, code, z = self._codes(batch)
        with full_precision(x.device), torch.no_grad():
            labels = network.tracked.assign(z, self.settings.literal)
        return x, code, z, labels

    def _codes(self, batch):
        network = self.network
        x = network.scaler(batch)
        code = network.autoencoder.encoder(x)
        with full_precision(x.device):  # autocast, where it is on, concerns the autoencoder only
            return x, code, network.whitener(code.to(x))

    def _terms(self, clustering, x, code, z, weight):
        settings, network = self.settings, self.network
        ramp = min(1.0, self.n_steps / settings.warm_up) if settings.warm_up else 1.0
        terms = {"clustering": ramp * settings.clustering_weight * clustering}
        if settings.reconstruction_weight:
            x_hat = network.autoencoder.decoder(code)
            with full_precision(x.device):
                unit = settings.reconstruction_weight / network.error_unit
                terms["reconstruction"] = unit * squared_error(x, x_hat.to(x), weight)
        terms["latent_variance"] = weight @ z.detach().square().mean(dim=1)
        return terms

    @torch.no_grad()
    def refresh(self):
        """One sweep of hard EM over the codes of a pool of rows."""
        rows, settings = self.rows, self.settings
        pool = rows.visited
        if len(pool) > settings.pool_size:
            drawn = torch.randint(len(pool), (settings.pool_size,), generator=self.generator)
            pool = pool[drawn]
        _, _, z = self._codes(rows.take(pool))
        weight = rows.weight[pool.to(rows.device)]
        with full_precision(z.device):
            how = settings.memory, settings.literal, settings.equal_weights
            self.network.tracked.refresh(z, weight, *how)


class EuclideanObjective(LatentObjective):
    """Half the squared distance, per dimension and in units of the first variance."""

    def clustering(self, z, centers, weight):
        return euclidean_loss(z, centers, weight) / (self.network.variance_unit * z.shape[1])


class KLObjective(LatentObjective):
    """Kullback-Leibler divergence per dimension."""

    def clustering(self, z, centers, weight):
        network = self.network
        log_deviation = network.deviation(z) + 0.5 * network.variance_unit.log()
        loss = kl_loss(z, log_deviation, centers, network.tracked.variance, weight)
        return loss / z.shape[1]


class AdversarialObjective(LatentObjective):
    """The game: the critic learns to tell codes from draws, the encoder to be taken for draws."""

    def phases(self):
        critic = tuple(self.network.critic.parameters())
        return (Phase(critic, self.critic_step), Phase(self._trained(), self.encoder_step))

    def critic_step(self, batch, index, weight):
        x, code, z, labels = self._encode(batch)
        with full_precision(x.device):
            seen = self.network.features(z, labels)
            # The step that follows needs the same codes: this one does not move the encoder.
            self._kept = x, code, z, seen
            drawn = self._draw(labels, weight, z)
            logits = self.network.critic(torch.cat([drawn, seen.detach()])).squeeze(1)
            positive, negative = logits[: len(drawn)], logits[len(drawn) :]
            loss = critic_loss(positive, negative, weight, self.settings.label_smoothing)
            with torch.no_grad():
                right = weight @ (negative < 0).to(weight)
                right = right + weight.sum() * (positive > 0).to(weight).mean()
        return {"critic": loss, "critic_accuracy": 0.5 * right}

    def encoder_step(self, batch, index, weight):
        x, code, z, seen = self._kept
        with full_precision(x.device):
            logits = self.network.critic(seen).squeeze(1)
            clustering = encoder_loss(logits, weight, self.settings.saturating)
        return self._terms(clustering, x, code, z, weight)

    def _draw(self, labels, weight, z):
        """Positives: draws from the components of the batch, as the critic sees them.

        Their number does not depend on that of the rows, so that a row that counts twice is the
        same as two rows.
        """
        shape = (min(self.settings.batch_size, MAX_DRAWS), z.shape[1])
        noise = torch.randn(shape, generator=self.generator, dtype=z.dtype).to(z.device)
        if self.network.conditional:
            return noise
        share = torch.rand(shape[:1], generator=self.generator, dtype=z.dtype).to(z.device)
        tracked = self.network.tracked
        nk = torch.zeros_like(tracked.weights).index_add_(0, labels, weight).cumsum(0)
        drawn = torch.searchsorted(nk, share * nk[-1], right=True).clamp_max(len(nk) - 1)
        return tracked.means[drawn] + tracked.variance.sqrt() * noise


OBJECTIVES = {"js": AdversarialObjective, "kl": KLObjective, "euclidean": EuclideanObjective}
