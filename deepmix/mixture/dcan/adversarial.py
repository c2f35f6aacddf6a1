"""The game of critic and encoder, and the two objectives that need no critic."""

from typing import NamedTuple

import torch

from deepmix._torch import full_precision
from deepmix.losses import squared_error
from deepmix.mixture.dcan.losses import critic_loss, encoder_loss, euclidean_loss, kl_loss
from deepmix.mixture.dcan.network import component, sweep
from deepmix.networks import trainable
from deepmix.training import Objective, Phase

# Draws of the critic's positives in a step, at most.
MAX_DRAWS = 2**13


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
            clustering = self.clustering(z, self.network.tracked_means[labels], weight)
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
            labels = component(z, network.tracked, self.settings.literal)
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
            self.network.track(sweep(z, weight, self.network.tracked, *how))


class EuclideanObjective(LatentObjective):
    """Half the squared distance, per dimension and in units of the first variance."""

    def clustering(self, z, centers, weight):
        return euclidean_loss(z, centers, weight) / (self.network.variance_unit * z.shape[1])


class KLObjective(LatentObjective):
    """Kullback-Leibler divergence per dimension."""

    def clustering(self, z, centers, weight):
        network = self.network
        log_deviation = network.deviation(z) + 0.5 * network.variance_unit.log()
        loss = kl_loss(z, log_deviation, centers, network.tracked_variance, weight)
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
        return tracked.means[drawn] + tracked.covariances.sqrt() * noise


OBJECTIVES = {"js": AdversarialObjective, "kl": KLObjective, "euclidean": EuclideanObjective}
