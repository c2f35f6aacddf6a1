"""What DCAN costs beside loops written by hand, and how long whole fits take.

A step is one of the critic and one of encoder and decoder, on rows of 14 x 14 pixels, with the
components refreshed every ten steps. The loop by hand does the same work with autograd and fused
Adam. Exit code 1 if a limit is broken.

    OMP_NUM_THREADS=1 python benchmarks/speed/dcan.py --quick
"""

import sys
import time

import numpy as np
import torch
from measuring import Measurement, main, random_rows, ratios, take_turns
from torch.nn.functional import softplus

from deepmix import DCAN
from deepmix.mixture.dcan.adversarial import OBJECTIVES

N_FEATURES, N_CLUSTERS, BATCH_SIZE, POOL, EVERY = 196, 10, 128, 1000, 10
# Limits: of the ratio of a step to that by hand, and of the seconds of a whole fit.
STEP, FIT = 1.05, 40.0

# --- Contestants -----------------------------------------------------------------------


class HandEpochs:
    """The loop that one would write for the game, or for half the squared distance.

    Parameters
    ----------
    network : DCANNetwork
        A copy, whose layers it uses as layers.
    X : Tensor
    adversarial : bool
    """

    def __init__(self, network, X, adversarial):
        self.X, self.adversarial = network.scaler(X), adversarial
        self.encoder, self.decoder = network.autoencoder.encoder, network.autoencoder.decoder
        self.critic, self.unit = network.critic, float(network.error_unit)
        copies = (v.float().clone() for v in network.tracked.tensors)
        self.weights, self.means, self.variance = copies
        self.start = float(self.variance)
        coders = [*self.encoder.parameters(), *self.decoder.parameters()]
        options = {"lr": 1e-3, "betas": (0.5, 0.999), "fused": True}
        self.optimizer = torch.optim.Adam(coders, **options)
        if adversarial:
            self.rival = torch.optim.Adam(self.critic.parameters(), **options)
        self.generator, self.n_steps = torch.Generator().manual_seed(0), 0

    def __call__(self):
        order = torch.randperm(len(self.X), generator=self.generator).to(self.X.device)
        totals = torch.zeros(5, device=self.X.device)
        for index in order.split(BATCH_SIZE):
            if self.n_steps and self.n_steps % EVERY == 0:
                self.refresh()
            self.n_steps += 1
            totals += self.step(self.X[index])
        return (totals / len(self.X)).tolist()

    def step(self, x):
        z = self.encoder(x)
        with torch.no_grad():
            labels = self.assign(z)
        if self.adversarial:
            clustering, critic, right = self.play(z, labels)
        else:
            clustering = 0.5 * (z - self.means[labels]).square().sum() / (self.start * z.shape[1])
            critic = right = torch.zeros(())
        error = (self.decoder(z) - x).square().sum() / self.unit
        self.optimizer.zero_grad(set_to_none=True)
        (clustering + error).backward()
        self.optimizer.step()
        spread = z.detach().square().mean(dim=1).sum()
        return torch.stack([clustering.detach(), error.detach(), spread, critic, right])

    def play(self, z, labels):
        residual = (z - self.means[labels]) * self.variance.rsqrt()
        noise = torch.randn(BATCH_SIZE, z.shape[1], generator=self.generator).to(z.device)
        logits = self.critic(torch.cat([noise, residual.detach()])).squeeze(1)
        positive, negative = logits[:BATCH_SIZE], logits[BATCH_SIZE:]
        loss = softplus(-positive).mean() * len(z) + softplus(negative).sum()
        self.rival.zero_grad(set_to_none=True)
        loss.backward()
        self.rival.step()
        right = (positive > 0).float().mean() * len(z) + (negative < 0).float().sum()
        for parameter in self.critic.parameters():
            parameter.requires_grad_(False)
        clustering = 3 * softplus(-self.critic(residual)).sum()
        for parameter in self.critic.parameters():
            parameter.requires_grad_(True)
        return clustering, loss.detach(), 0.5 * right

    def assign(self, z):
        bias = self.weights.log() - 0.5 * self.means.square().sum(dim=1) / self.variance
        return torch.addmm(bias, z, (self.means / self.variance).T).argmax(dim=1)

    @torch.no_grad()
    def refresh(self):
        pool = torch.randint(len(self.X), (POOL,), generator=self.generator)
        z = self.encoder(self.X[pool.to(self.X.device)])
        labels = self.assign(z)
        z = z.double()
        nk = torch.bincount(labels, minlength=N_CLUSTERS).double()
        sums = torch.zeros(N_CLUSTERS, z.shape[1], dtype=z.dtype, device=z.device)
        means = sums.index_add_(0, labels, z) / nk.clamp_min(1)[:, None]
        within = (z - means[labels]).square().mean() + 1e-3 * z.var(dim=0).mean()
        means = torch.where((nk > 3)[:, None], means, self.means.double())
        weights = (nk / POOL).clamp_min(0.1 / N_CLUSTERS)
        new = weights / weights.sum(), means, within
        self.weights, self.means, self.variance = (
            (0.5 * a + 0.5 * b).float()
            for a, b in zip((self.weights, self.means, self.variance), new, strict=True)
        )


# --- What is measured ------------------------------------------------------------------


def steps(divergence, n_rows, n_rounds, device):
    """An epoch of the engine against one by hand."""
    rows, X = random_rows(n_rows, N_FEATURES, device)
    options = {"divergence": divergence, "pretrain_max_iter": 1, "max_iter": 0, "random_state": 0}
    model = DCAN(N_CLUSTERS, covariance_type="tracked", device=device, **options)
    model.fit(X.cpu().numpy())
    networks = [model._rebuild(torch.float32, device).train() for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    objective = OBJECTIVES[divergence](networks[0], rows, model._settings(rows), generator)
    hand = HandEpochs(networks[1], X, divergence == "js")
    times = take_turns(
        objective, rows, {"hand": hand}, n_rounds, batch_size=BATCH_SIZE, momentum=0.5
    )
    yield Measurement.of(
        f"step ({divergence}) / by hand", ratios(times, "engine", "hand"), "x", at_most=STEP
    )
    milliseconds = [1e3 * t / -(-n_rows // BATCH_SIZE) for t in times["engine"]]
    yield Measurement.of(f"step ({divergence})", milliseconds, "ms")


def fits(n_rows, device):
    """A fit with the defaults, autoencoder and mixture of the codes included."""
    draw = np.random.default_rng(0)
    means = draw.random((N_CLUSTERS, N_FEATURES))
    X = means[draw.integers(0, N_CLUSTERS, n_rows)] + 0.2 * draw.normal(size=(n_rows, N_FEATURES))
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    DCAN(N_CLUSTERS, device=device, random_state=0).fit(X.astype(np.float32))
    yield Measurement.of(f"fit of {n_rows} rows", [clock() - start], "s", at_most=FIT)


def measurements(options, device):
    n_rows, n_rounds = (2000, 5) if options.quick else (10_000, 15)
    for divergence in ("js", "euclidean"):
        yield from steps(divergence, n_rows, n_rounds, device)
    yield from fits(n_rows, device)


if __name__ == "__main__":
    sys.exit(main("dcan", __doc__, measurements))
