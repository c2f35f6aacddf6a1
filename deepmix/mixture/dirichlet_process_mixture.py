r"""A Dirichlet process mixture of Gaussians whose responsibilities are learnt: equations, training.

The losses of Ronen et al. (2022), the clustering net and the subclustering nets, and the two ways
of training the mixture: with these nets, or by EM. The estimators are in `deepmix.mixture.deep_dpm`
and `deepmix.mixture.autoencoder_deep_dpm`.
"""

from functools import partial

import torch
from torch import nn

from deepmix._torch import state_to_numpy
from deepmix.callbacks import EarlyStopping
from deepmix.gaussian_mixture import GaussianMixtureHead
from deepmix.networks import MLP, FeatureScaler, build_on_meta
from deepmix.proposals import Splitter
from deepmix.training import Objective, Phase

# Proposals come after so many epochs of EM at the latest, and after so many times
# ``split_merge_every`` steps of the nets.
MAX_EM_EPOCHS, MAX_WAIT = 15, 3
# Rounds with an accepted proposal, after which the best partition so far is taken.
MAX_ROUNDS = 60
# Steps between two M-steps of the amortized training, at least: small data have short epochs.
STEPS_PER_ESTIMATE = 50
# Numbers that rows make of all clusters at once, in float64: 4 MiB, which is faster than more, and
# as much for 300 clusters as for three.
PRODUCTS = 2**19

# --- Losses ----------------------------------------------------------------------------


def clustering_loss(log_resp, target, weight):
    r"""Divergence of the net's responsibilities from those of the mixture.

    .. math:: L_{cl} = \sum_i w_i \, \mathrm{KL}(r^E_i \Vert r_i)
        = \sum_i w_i \sum_k r^E_{ik} (\log r^E_{ik} - \log r_{ik})

    In the direction of the authors' program; the paper has :math:`\mathrm{KL}(r_i \Vert r^E_i)`.

    Parameters
    ----------
    log_resp : Tensor of shape (B, K)
        Of the net.
    target : Tensor of shape (B, K)
        Responsibilities of the mixture.
    weight : Tensor of shape (B,)

    Returns
    -------
    Tensor of shape ()
    """
    return weight @ (torch.xlogy(target, target) - target * log_resp).sum(dim=1)


def subclustering_loss(x, resp, means, weight):
    r"""Soft 2-means of each cluster.

    .. math:: L_{sub} = \sum_i w_i \sum_{j=1}^2 \tilde r_{ij}
        \lVert x_i - \tilde\mu_{z_i j} \rVert^2

    Parameters
    ----------
    x : Tensor of shape (B, d)
    resp : Tensor of shape (B, 2)
        Of the two halves of the row's own cluster.
    means : Tensor of shape (B, 2, d)
        Theirs.
    weight : Tensor of shape (B,)

    Returns
    -------
    Tensor of shape ()
    """
    return weight @ (resp * (x[:, None] - means).square().sum(dim=2)).sum(dim=1)


# --- Pieces of batches -----------------------------------------------------------------


def piece(means):
    """Rows whose products with all clusters are `PRODUCTS` numbers."""
    return max(16, PRODUCTS // means.numel())


def in_pieces(function, means, *batches):
    """Apply a function of rows to a batch, piece by piece."""
    parts = list(zip(*(batch.split(piece(means)) for batch in batches), strict=True))
    if len(parts) == 1:
        return function(*parts[0])
    return torch.cat([function(*part) for part in parts])


# --- Network ---------------------------------------------------------------------------


class DPMNetwork(nn.Module):
    """Scaling, mixture and, if amortized, the clustering net.

    Attributes
    ----------
    scaler : FeatureScaler
    mixture : GaussianMixtureHead
    net : MLP or None
        Logits of the responsibilities.
    """

    def __init__(self, n_features, n_clusters, hidden_layer_sizes=None, full=True, normalize=False):
        super().__init__()
        self.scaler = FeatureScaler(n_features, normalize)
        self.mixture = GaussianMixtureHead(n_features, n_clusters, full)
        self.net = None
        if hidden_layer_sizes is not None:
            sizes = (n_features, *hidden_layer_sizes, n_clusters)
            self.net = build_on_meta(lambda: MLP(sizes, negative_slope=0.0))

    @property
    def width(self):
        """Numbers that a row becomes at most."""
        return self.mixture.means.numel()

    def log_resp(self, x):
        """Log-responsibilities of scaled rows: (B, d) -> (B, K)."""
        logits = self.mixture.log_joint(x) if self.net is None else self.net(x)
        return logits.log_softmax(dim=1)

    def labels(self, x):
        """Most responsible clusters of scaled rows, a few rows at once."""
        return in_pieces(lambda part: self.log_resp(part).argmax(dim=1), self.mixture.means, x)

    def resp(self, x):
        """Responsibilities of rows in the units of the data."""
        return self.log_resp(self.scaler(x)).exp()

    def log_density(self, x):
        """Of the mixture, in the units of the data."""
        log_joint = self.mixture.log_joint(self.scaler(x))
        return torch.logsumexp(log_joint, dim=1) - self.scaler.log_volume()

    def forward(self, x):
        return self.resp(x)

    def select(self, restart):
        return self

    @torch.no_grad()
    def inherit(self, origin):
        """Give the net one output for each entry of ``origin``, a copy of that old output."""
        if self.net is None:
            return
        last = self.net[-1]
        origin = origin.to(last.weight.device)
        last.weight = nn.Parameter(last.weight[origin])
        last.bias = nn.Parameter(last.bias[origin])
        last.out_features = len(origin)


class SubclusteringNets(nn.Module):
    """A two-way net in each cluster, K of them side by side.

    Attributes
    ----------
    hidden_weight, output_weight : Tensor of shape (K, d, h), (K, h, 2)
    hidden_bias, output_bias : Tensor of shape (K, h), (K, 2)
    """

    def __init__(self, n_features, n_clusters, n_hidden):
        super().__init__()
        zeros = partial(torch.zeros, dtype=torch.float32)  # drawn into, whatever the default
        self.hidden_weight = nn.Parameter(zeros(n_clusters, n_features, n_hidden))
        self.hidden_bias = nn.Parameter(zeros(n_clusters, n_hidden))
        self.output_weight = nn.Parameter(zeros(n_clusters, n_hidden, 2))
        self.output_bias = nn.Parameter(zeros(n_clusters, 2))

    @torch.no_grad()
    def draw(self, generator):
        """Glorot-uniform weights, zero biases; drawn on the CPU."""
        for weight in (self.hidden_weight, self.output_weight):
            bound = (6.0 / sum(weight.shape[1:])) ** 0.5
            drawn = torch.empty(weight.shape, dtype=weight.dtype)
            weight.copy_(drawn.uniform_(-bound, bound, generator=generator))
        return self

    def log_resp(self, x, labels):
        """Each row by the net of its cluster: (B, d), (B,) -> (B, 2)."""
        hidden = torch.bmm(x[:, None], self.hidden_weight[labels]).squeeze(1)
        hidden = (hidden + self.hidden_bias[labels]).relu()
        logits = torch.bmm(hidden[:, None], self.output_weight[labels]).squeeze(1)
        return (logits + self.output_bias[labels]).log_softmax(dim=1)


# --- Training --------------------------------------------------------------------------


class Settled(EarlyStopping):
    """Ends training when no proposal is left."""

    def __init__(self, objective):
        self.objective, self.converged = objective, False

    def __call__(self, state):
        self.converged = self.objective.partition.settled
        return self.objective.finished


class PartitionObjective(Objective):
    """What both ways of training share: rounds of proposals at the ends of epochs.

    Parameters
    ----------
    network : DPMNetwork
    partition : Partition
    tol : float
        Share of the rows that change cluster in an epoch, at which proposals are made.
    """

    def __init__(self, network, partition, tol):
        self.network, self.partition, self.tol = network, partition, tol
        self.finished, self.n_clusters, self.n_rounds = False, [], 0
        self.best, self.epoch = None, 0
        self.publish()

    def publish(self):
        """Hand the mixture to the network."""
        part = self.partition
        self.network.mixture.set(part.weights, part.means, part.covariances)

    def inherit(self, origin):
        self.network.inherit(origin)

    def subnets_state(self):
        """What a later fit goes on with beside the network: dict of ndarray, or None."""
        return None

    def next_partition(self, cuts=None):
        """Propose changes; whether the clusters are others now."""
        if self.finished:
            return False
        if self.n_rounds >= MAX_ROUNDS:
            self.restore()
            return True
        self.keep_best()
        origin = self.partition.change(self.epoch, cuts)
        if origin is None:
            self.finished = True
            return False
        self.n_rounds += 1
        self.inherit(origin)
        self.publish()
        return True

    def keep_best(self):
        score = self.partition.score()
        if self.best is None or score > self.best[0]:
            part = self.partition
            mixture = (part.weights, part.means, part.covariances)
            net = None if self.network.net is None else self.network.net.state_dict()
            net = net and {name: value.clone() for name, value in net.items()}
            self.best = score, part.labels, part.n_clusters, mixture, net

    def restore(self):
        """Go back to the partition of highest posterior."""
        part = self.partition
        _, part.labels, part.n_clusters, mixture, net = self.best
        part.weights, part.means, part.covariances = mixture
        # Outputs in the right number, whose weights are then the kept ones; new subnets.
        self.inherit(torch.zeros(part.n_clusters, dtype=torch.long))
        if net is not None:
            self.network.net.load_state_dict(net)
        self.publish()
        self.finished = True

    @torch.no_grad()
    def finish(self):
        """Leave no cluster that no row belongs to."""
        part, dtype = self.partition, self.network.mixture.means.dtype
        part.labels = part.data.map(lambda x, rows: self.network.labels(x.to(dtype)))
        origin = part.drop_empty()
        if origin is not None:
            self.inherit(origin)
            self.publish()
        self.n_clusters[-1:] = [part.n_clusters]

    def on_epoch_end(self, epoch):
        self.epoch = epoch
        changed = self.end_of_epoch()
        self.n_clusters.append(self.partition.n_clusters)
        return changed


class MixtureObjective(PartitionObjective):
    """EM of the mixture itself: an epoch is one E-step and one M-step, in float64."""

    def __init__(self, network, partition, tol):
        super().__init__(network, partition, tol)
        self._since = 0  # epochs since the last proposals

    def phases(self):
        return (Phase((), self.step, closed_form=True),)

    def on_epoch_start(self, epoch):
        n_samples = self.partition.data.rows.n_samples
        self._labels = self.partition.labels.new_zeros(n_samples)
        self._sums = None
        self._head = GaussianMixtureHead(1, 1).to(self.network.mixture.means.device).double()
        part = self.partition
        self._head.set(part.weights, part.means, part.covariances)

    def step(self, batch, index, weight):
        x, weight = self.network.scaler(batch).double(), weight.double()
        log_density = in_pieces(self._e_step, self._head.means, x, weight, index)
        return {"negative_log_likelihood": -(weight @ log_density)}, ()

    def _e_step(self, x, weight, index):
        log_joint = self._head.log_joint(x)
        log_density = torch.logsumexp(log_joint, dim=1)
        resp = (log_joint - log_density[:, None]).exp() * weight[:, None]
        self._labels[index] = log_joint.argmax(dim=1)
        part = self.partition
        sums = part.data.soft_statistics(x, resp, part.prior.covariance_type)
        self._sums = sums if self._sums is None else self._sums + sums
        return log_density

    def end_of_epoch(self):
        part = self.partition
        labels = self._labels[part.data.index.to(self._labels.device)]
        moved = float((labels != part.labels).double() @ part.data.weight) / part.data.total_weight
        part.labels, self._since = labels, self._since + 1
        part.estimate(self._sums)
        part.drop_empty()
        self.publish()
        # Labels that a fit begins with are those of its first E-step if it goes on from a mixture.
        known = self.epoch > 0 or not part.resumed
        if (known and moved <= self.tol) or self._since >= MAX_EM_EPOCHS:
            self.next_partition()
            self._since = 0
        return False


class AmortizedObjective(PartitionObjective):
    """The paper's training: the clustering net follows the mixture, the mixture the net.

    Parameters
    ----------
    network, partition, tol
        As for `PartitionObjective`.
    subnets : SubclusteringNets
    generator : torch.Generator
    split_merge_every : int
        Steps between two rounds of proposals.
    freeze : int
        Steps after a round in which the mixture stays as the proposal made it.
    rate : float
        Learning rate of the subclustering nets.
    """

    def __init__(
        self, network, partition, tol, *, subnets, generator, split_merge_every, freeze, rate
    ):
        super().__init__(network, partition, tol)
        self.subnets, self.generator, self.rate = subnets, generator, rate
        self.split_merge_every, self.freeze = split_merge_every, freeze
        self.n_steps, self._estimated = 0, 0
        self.find_halves()

    def prepare(self, batch):
        """Scaled rows beside their targets, for several batches at once."""
        x = self.network.scaler(batch)
        mixture = self.network.mixture
        log_joint = in_pieces(mixture.log_joint, mixture.means, x)
        return torch.cat([x, log_joint.softmax(dim=1)], dim=1)

    def phases(self):
        net, subnets = tuple(self.network.net.parameters()), tuple(self.subnets.parameters())
        return (Phase(net, self.step), Phase(subnets, self.substep, learning_rate=self.rate))

    def _parts(self, batch):
        n_features = self.network.mixture.means.shape[1]
        return batch[:, :n_features], batch[:, n_features:]

    def step(self, batch, index, weight):
        x, target = self._parts(batch)
        self.n_steps += 1
        return {"clustering": clustering_loss(self.network.log_resp(x), target, weight)}

    def substep(self, batch, index, weight):
        x, _ = self._parts(batch)
        with torch.no_grad():
            labels = self.network.net(x).argmax(dim=1)
        resp = self.subnets.log_resp(x, labels).exp()
        return {"subclustering": subclustering_loss(x, resp, self.halves[labels], weight)}

    def find_halves(self):
        """Means of the two halves of each cluster, by the cut of its first direction."""
        part = self.partition
        first = Splitter(part.data, part.prior, 0.0, n_directions=1, n_refinements=0)
        self._set_halves(first(part.labels, part.n_clusters).halves)

    def _set_halves(self, statistics):
        means = statistics.first / statistics.nk.clamp_min(1e-300)[:, None]
        shape = (self.partition.n_clusters, 2, -1)
        self.halves = means.view(shape).to(self.network.mixture.means)

    @torch.no_grad()
    def estimate(self):
        """M-step under the net's responsibilities; the labels and halves of every row."""
        part, dtype = self.partition, self.network.mixture.means.dtype
        labels, sides, total = [], [], None
        pieces = (
            pair
            for rows, x in part.data.chunks()
            for pair in zip(*(v.split(piece(part.means)) for v in (x, part.data.weight[rows])))
        )
        for x, weight in pieces:
            log_resp = self.network.log_resp(x.to(dtype))
            resp = log_resp.double().exp() * weight[:, None]
            sums = part.data.soft_statistics(x, resp, part.prior.covariance_type)
            total = sums if total is None else total + sums
            labels.append(log_resp.argmax(dim=1))
            sides.append(self.subnets.log_resp(x.to(dtype), labels[-1]).argmax(dim=1))
        labels = torch.cat(labels)
        moved = (labels != part.labels).double() @ part.data.weight / part.data.total_weight
        part.labels = labels
        part.estimate(total)
        self.publish()
        return torch.cat(sides), float(moved)

    def end_of_epoch(self):
        early = self.n_steps - self._estimated < STEPS_PER_ESTIMATE
        if self.n_steps < self.freeze or early:
            return False
        self._estimated, part = self.n_steps, self.partition
        sides, moved = self.estimate()
        origin = part.drop_empty()
        if origin is not None:
            self.inherit(origin)
            self.publish()
        changed = False
        late = self.n_steps >= MAX_WAIT * self.split_merge_every
        if self.n_steps >= self.split_merge_every and (moved <= self.tol or late):
            changed = self.next_partition(part.splitter.cuts(part.labels, sides, part.n_clusters))
            self.n_steps = self._estimated = 0
        self.find_halves()
        return changed or origin is not None

    def inherit(self, origin):
        super().inherit(origin)
        like, n_clusters = self.subnets.hidden_weight, len(origin)
        new = SubclusteringNets(like.shape[1], n_clusters, like.shape[2])
        new = new.draw(self.generator).to(like)
        # Children of a split begin anew; every other cluster keeps its net.
        kept = (torch.bincount(origin)[origin] == 1).nonzero().squeeze(1)
        with torch.no_grad():
            for own, old in zip(new.parameters(), self.subnets.parameters(), strict=True):
                own[kept] = old[origin[kept]]
        self.subnets = new

    def subnets_state(self):
        return state_to_numpy(self.subnets)
