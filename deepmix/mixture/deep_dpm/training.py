"""Two ways to cluster given rows: EM, and training of nets that learn the responsibilities.

Both begin with a partition, propose splits and merges when it stands still, and return a `DPMFit`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from deepmix._torch import state_to_numpy
from deepmix.callbacks import EpochState, Interruption, StopWhen
from deepmix.gaussian_mixture import Mixture
from deepmix.mixture.deep_dpm.losses import clustering_loss, subclustering_loss
from deepmix.mixture.deep_dpm.network import SubclusteringNets, in_pieces, piece
from deepmix.mixture.deep_dpm.proposals import Splitter
from deepmix.mixture.deep_dpm.split_merge import PROPOSAL
from deepmix.training import History, Objective, Phase, minimize, refuse_divergence

# Proposals wait until labels settle: at most MAX_EM_EPOCHS epochs of EM, and with nets at most
# MAX_WAIT * split_merge_every steps.
MAX_EM_EPOCHS, MAX_WAIT = 15, 3
# Number of rounds with an accepted proposal after which the best partition so far is taken.
MAX_ROUNDS = 60
# Least number of steps between two M-steps of amortized training; an epoch of small data has fewer.
STEPS_PER_ESTIMATE = 50


# --- The search for clusters -----------------------------------------------------------


class Start(NamedTuple):
    """Where a clustering begins: at labels, or at the mixture of a fit to go on with.

    Attributes
    ----------
    labels : Tensor of shape (n,) or None
    mixture : Mixture or None
        Mixture of the scaled rows, in float64.
    subnets : dict of ndarray or None
        State of the subclustering nets.
    """

    labels: torch.Tensor | None = None
    mixture: Mixture | None = None
    subnets: dict | None = None


@dataclass
class DPMFit:
    """What a clustering of given rows returns.

    Attributes
    ----------
    history : History
    mixture : Mixture
        Mixture of the scaled rows, in float64.
    log_posterior : float
        Log posterior of the partition, up to a constant.
    n_clusters : ndarray of shape (n_iter,)
        Number of clusters after each epoch.
    proposals : ndarray
        Every proposal that was made, of type `PROPOSAL`.
    subnets : SubclusteringNets or None
        The subclustering nets, of amortized training.
    """

    history: History
    mixture: Mixture
    log_posterior: float
    n_clusters: np.ndarray
    proposals: np.ndarray
    subnets: SubclusteringNets | None = None

    @property
    def criterion(self):
        """Minus the log posterior; infinite if the mixture is not finite."""
        finite = torch.stack([values.sum() for values in self.mixture.tensors]).isfinite().all()
        return -self.log_posterior if finite else np.inf

    @property
    def subnets_state(self):
        """What a later fit goes on with beside the network: dict of ndarray, or None."""
        return None if self.subnets is None else state_to_numpy(self.subnets)


class Search:
    """Rounds of proposals between epochs of training; the best partition so far is kept.

    Parameters
    ----------
    network : DPMNetwork
        It takes the mixture, and an output for each cluster, whenever clusters change.
    partition : Partition
    subnets : SubclusteringNets or None

    Attributes
    ----------
    finished : bool
        Whether no proposal is left, or so many rounds have been that the best was taken.
    """

    def __init__(self, network, partition, subnets=None):
        self.network, self.partition, self.subnets = network, partition, subnets
        self.finished, self.n_rounds, self.best = False, 0, None
        self.update_mixture()

    def update_mixture(self):
        """Give the network the mixture as it stands."""
        self.network.set_mixture(self.partition.mixture)

    def inherit(self, origin):
        """Give the nets one output for each entry of ``origin``, the number of its parent."""
        self.network.inherit(origin)
        if self.subnets is not None:
            self.subnets.inherit(origin)

    def drop_empty(self):
        """Remove clusters without rows; whether there were any."""
        origin = self.partition.drop_empty()
        if origin is not None:
            self.inherit(origin)
            self.update_mixture()
        return origin is not None

    def propose(self, epoch, cuts=None):
        """One round of proposals: whether the clusters are others now."""
        if self.finished:
            return False
        if self.n_rounds >= MAX_ROUNDS:
            self._restore()
            return True
        self._keep_best()
        origin = self.partition.change(epoch, cuts)
        if origin is None:
            self.finished = True
            return False
        self.n_rounds += 1
        self.inherit(origin)
        self.update_mixture()
        return True

    def _keep_best(self):
        score = self.partition.score()
        if self.best is None or score > self.best[0]:
            part = self.partition
            net = None if self.network.net is None else self.network.net.state_dict()
            net = net and {name: value.clone() for name, value in net.items()}
            self.best = score, part.labels, part.n_clusters, part.mixture, net

    def _restore(self):
        """Go back to the partition of highest posterior."""
        part = self.partition
        _, part.labels, part.n_clusters, part.mixture, net = self.best
        # The nets get as many outputs as the kept partition has clusters. The clustering net then
        # takes its kept weights. The subclustering nets are not trained any more.
        self.inherit(torch.zeros(part.n_clusters, dtype=torch.long))
        if net is not None:
            self.network.net.load_state_dict(net)
        self.update_mixture()
        self.finished = True

    def ends(self, tol):
        """Callbacks that end training when the search is finished; none if ``tol`` is zero."""
        return [Settled(self)] if tol > 0 else []

    @torch.no_grad()
    def finish(self, history, n_clusters):
        """Leave no cluster that no row belongs to: `DPMFit`."""
        part, dtype = self.partition, self.network.mixture.means.dtype
        part.labels = part.data.map(lambda x, rows: self.network.labels(x.to(dtype)))
        self.drop_empty()
        n_clusters = [*n_clusters[: history.n_iter][:-1], part.n_clusters][: history.n_iter]
        return DPMFit(
            history,
            part.mixture,
            part.score(),
            np.array(n_clusters, dtype=int),
            np.array(part.proposals, dtype=PROPOSAL),
            self.subnets,
        )


class Settled(StopWhen):
    """Ends training when the search is finished, as converged if no proposal is left."""

    def __init__(self, search):
        super().__init__(lambda: search.finished)
        self.partition = search.partition

    def __call__(self, state):
        finished = super().__call__(state)
        self.converged = self.partition.settled
        return finished


# --- Training by EM --------------------------------------------------------------------


def fit_by_em(network, partition, *, max_iter, tol, callbacks=(), interruption=None, task="fit"):
    """EM of the mixture, in float64, with proposals whenever it stands still.

    Parameters
    ----------
    network : DPMNetwork
        It takes the mixture after each epoch.
    partition : Partition
        The clusters to begin with.
    max_iter : int
        Epochs, at most: one E-step and one M-step each.
    tol : float
        Proposals are made when no larger share of the rows has changed cluster. 0 runs for
        ``max_iter`` epochs.
    callbacks : sequence of callable
        ``callback(EpochState) -> True`` stops after that epoch.
    interruption : Interruption or None
        Once it is requested EM ends with the last whole epoch.
    task : str
        Name of the stage, in messages.

    Returns
    -------
    DPMFit
    """
    history, interruption = History(), interruption or Interruption()
    search, n_clusters, since = Search(network, partition), [], 0
    callbacks = [*search.ends(tol), *callbacks]
    for epoch in range(max_iter):
        sums = e_step(partition, interruption)
        if sums is None:
            history.interrupted = True
            interruption.notice(f"after {epoch} of {max_iter} epochs ({task})")
            break
        labels, statistics, log_likelihood = sums
        moved, since = partition.data.share(labels != partition.labels), since + 1
        partition.labels = labels
        partition.estimate(statistics)  # M-step
        partition.drop_empty()
        search.update_mixture()
        # When a fit goes on from a mixture, labels come from that mixture: that none has moved
        # in the first epoch proves nothing.
        known = epoch > 0 or not partition.resumed
        if (known and moved <= tol) or since >= MAX_EM_EPOCHS:
            search.propose(epoch)
            since = 0
        n_clusters.append(partition.n_clusters)
        loss = -np.float64(log_likelihood) / partition.data.rows.total_weight
        terms = {"negative_log_likelihood": loss}
        refuse_divergence(terms, epoch, task)
        if history.record(EpochState(task, epoch, max_iter, terms), callbacks):
            break
    return search.finish(history, n_clusters)


def e_step(partition, interruption):
    """Responsibilities under the mixture, summed over the rows.

    Returns
    -------
    labels : Tensor of shape (n,)
    statistics : GaussianStatistics
    log_likelihood : float
        All three as one tuple; None where the interruption was requested.
    """
    mixture = partition.mixture.to_module()
    labels, statistics, log_likelihood = [], None, 0.0
    for x, weight in pieces(partition):
        if interruption.requested:
            return None
        log_joint = mixture.log_joint(x)
        log_density = torch.logsumexp(log_joint, dim=1)
        resp = (log_joint - log_density[:, None]).exp() * weight[:, None]
        sums = partition.data.soft_statistics(x, resp, partition.prior.covariance_type)
        statistics = sums if statistics is None else statistics + sums
        log_likelihood = log_likelihood + weight @ log_density
        labels.append(log_joint.argmax(dim=1))
    return torch.cat(labels), statistics, float(log_likelihood)


def pieces(partition):
    """Yield the rows in float64 with their weights, as many at once as `piece` says."""
    size = piece(partition.mixture.means)
    for chosen, x in partition.data.chunks():
        yield from zip(x.split(size), partition.data.weight[chosen].split(size), strict=True)


# --- Training by nets ------------------------------------------------------------------


class AmortizedObjective(Objective):
    """The paper's training: the clustering net follows the mixture, the mixture the net.

    Parameters
    ----------
    search : Search
        With the network, its subclustering nets and the partition.
    tol : float
        Proposals are made when no larger share of the rows has changed cluster.
    split_merge_every : int
        Steps between two rounds of proposals.
    freeze : int
        Steps at the start and after each round in which the mixture is not estimated.
    rate : float
        Learning rate of the subclustering nets.
    """

    def __init__(self, search, tol, *, split_merge_every, freeze, rate):
        self.search, self.network, self.partition = search, search.network, search.partition
        self.tol, self.rate = tol, rate
        self.split_merge_every, self.freeze = split_merge_every, freeze
        self.n_clusters, self.n_steps, self._estimated = [], 0, 0
        self.find_halves()

    def prepare(self, batch):
        """Scaled rows beside their targets, for several batches at once."""
        x = self.network.scaler(batch)
        mixture = self.network.mixture
        log_joint = in_pieces(mixture.log_joint, mixture.means, x)
        return torch.cat([x, log_joint.softmax(dim=1)], dim=1)

    def phases(self):
        net = tuple(self.network.net.parameters())
        subnets = tuple(self.search.subnets.parameters())
        return (Phase(net, self.step), Phase(subnets, self.substep, learning_rate=self.rate))

    def _parts(self, batch):
        n_features = self.network.mixture.means.shape[1]
        return batch[:, :n_features], batch[:, n_features:]

    def step(self, batch, index, weight):
        x, target = self._parts(batch)
        self.n_steps += 1
        return {"clustering": self.loss(x, target, weight)}

    def loss(self, x, target, weight):
        """Loss of the clustering net on scaled rows: Tensor of shape ()."""
        return clustering_loss(self.network.log_resp(x), target, weight)

    def substep(self, batch, index, weight):
        x, _ = self._parts(batch)
        with torch.no_grad():
            labels = self.network.net(x).argmax(dim=1)
        resp = self.search.subnets.log_resp(x, labels).exp()
        return {"subclustering": subclustering_loss(x, resp, self.halves[labels], weight)}

    def find_halves(self):
        """Means of the two halves of each cluster, by the cut of its first direction."""
        part = self.partition
        first = Splitter(part.data, part.prior, 0.0, n_directions=1, n_refinements=0)
        statistics = first(part.labels, part.n_clusters).halves
        means = statistics.first / statistics.nk.clamp_min(1e-300)[:, None]
        self.halves = means.view(part.n_clusters, 2, -1).to(self.network.mixture.means)

    @torch.no_grad()
    def estimate(self):
        """M-step under the net's responsibilities.

        Returns
        -------
        sides : Tensor of shape (n,)
            Half of its cluster that each row is in, by the subclustering nets.
        moved : float
            Share of the rows that have changed cluster.
        """
        part, dtype = self.partition, self.network.mixture.means.dtype
        labels, sides, statistics = [], [], None
        for x, weight in pieces(part):
            log_resp = self.network.log_resp(x.to(dtype))
            resp = log_resp.double().exp() * weight[:, None]
            sums = part.data.soft_statistics(x, resp, part.prior.covariance_type)
            statistics = sums if statistics is None else statistics + sums
            labels.append(log_resp.argmax(dim=1))
            sides.append(self.search.subnets.log_resp(x.to(dtype), labels[-1]).argmax(dim=1))
        labels = torch.cat(labels)
        moved = part.data.share(labels != part.labels)
        part.labels = labels
        part.estimate(statistics)
        self.search.update_mixture()
        return torch.cat(sides), moved

    def cuts(self, sides):
        """Cuts of the clusters by the subclustering nets, for proposals: Cuts or None."""
        return self.partition.splitter.cuts(self.partition.labels, sides, self.partition.n_clusters)

    def on_epoch_end(self, epoch):
        changed = self._end_of_epoch(epoch)
        self.n_clusters.append(self.partition.n_clusters)
        return changed

    def _end_of_epoch(self, epoch):
        early = self.n_steps - self._estimated < STEPS_PER_ESTIMATE
        if self.n_steps < self.freeze or early:
            return False
        self._estimated = self.n_steps
        sides, moved = self.estimate()
        changed = self.search.drop_empty()
        late = self.n_steps >= MAX_WAIT * self.split_merge_every
        if self.n_steps >= self.split_merge_every and (moved <= self.tol or late):
            changed |= self.search.propose(epoch, self.cuts(sides))
            self.n_steps = self._estimated = 0
        self.find_halves()
        return changed


def fit_by_nets(
    network,
    partition,
    subnets,
    *,
    max_iter,
    tol,
    batch_size,
    learning_rate,
    subcluster_learning_rate,
    split_merge_every,
    freeze,
    generator,
    objective_class=AmortizedObjective,
    callbacks=(),
    **watchers,
):
    """Train the clustering net and the subclustering nets, and the mixture with them.

    Parameters
    ----------
    network : DPMNetwork
        With a clustering net.
    partition : Partition
        The clusters to begin with.
    subnets : SubclusteringNets
    max_iter : int
        Epochs, at most.
    tol : float
        Proposals are made when no larger share of the rows has changed cluster. 0 trains for
        ``max_iter`` epochs.
    batch_size : int
        Rows in a step.
    learning_rate, subcluster_learning_rate : float
        Step sizes of the clustering net and of the subclustering nets.
    split_merge_every, freeze : int
        As for `AmortizedObjective`.
    generator : torch.Generator
        Draws the order of the rows.
    objective_class : type
        `AmortizedObjective`, or one with another loss or other cuts.
    callbacks : sequence of callable
        ``callback(EpochState) -> True`` stops after that epoch.
    **watchers
        ``interruption`` and ``task`` of `minimize`.

    Returns
    -------
    DPMFit
    """
    search = Search(network, partition, subnets)
    rounds = {"split_merge_every": split_merge_every, "freeze": freeze}
    objective = objective_class(search, tol, rate=subcluster_learning_rate, **rounds)
    history = minimize(
        objective,
        partition.data.rows,
        max_iter=max_iter,
        batch_size=batch_size,
        learning_rate=learning_rate,
        generator=generator,
        callbacks=[*search.ends(tol), *callbacks],
        buffers=network.buffers,
        **watchers,
    )
    return search.finish(history, objective.n_clusters)
