r"""The network that is the mixture of `NeuralMixtureEM`: its losses, its EM steps, its restarts.

Tissera et al., "Neural Mixture Models with Expectation-Maximization for End-to-end Deep
Clustering", Neurocomputing 505 (2022), Secs. 4 to 7: scores, normalisation and densities, the loss
of a batch (Eq. 6), with views (Eq. 7), consistency (Eq. 8). The parts after them are ours:
agreement of restarts, and clusters of unequal size out of more outputs than clusters.
"""

import copy
import math
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn.functional import logsigmoid, one_hot

from deepmix._torch import apply_batchwise, full_precision, sum_batchwise
from deepmix.augmentation import grayscale, sobel
from deepmix.networks import (
    ConvNet,
    Members,
    StackedMLP,
    Standardizer,
    check_shapes,
    is_meta,
    make_coder,
    materialize,
    trainable,
    widest,
)
from deepmix.partitions import merge, neighbour_graph, normalized_cut, pair_weights
from deepmix.training import Objective, Phase

# Added to the variance of the scores: between 1e-5 and 1e-3 nothing changes, .1 does harm.
EPSILON = 1e-5
# Of unequal clusters: rows that the graph joins; share of its due below which an output is left
# out; and the cut below which all cuts are alike.
GRAPH_ROWS, SMALLEST_PIECE, NO_CUT = 4000, 0.2, 1e-3

# --- Losses ----------------------------------------------------------------------------


def normalize(scores, weight, epsilon=EPSILON):
    r"""Relevance scores standardised over the batch, Sec. 5.

    .. math:: a^*_{ij} = \frac{a_{ij} - \mu_j}{\sigma_j}, \qquad
        \mu_j = \frac1n \sum_i a_{ij}, \qquad \sigma_j^2 = \frac1n \sum_i (a_{ij} - \mu_j)^2

    The gradient flows through the statistics; taken as constants, in a batch or as running
    means, training collapses to uniform posteriors.

    Parameters
    ----------
    scores : Tensor of shape (B, K) or (B, M, K)
        M networks side by side.
    weight : Tensor of shape (B,)
        Row i counts ``weight[i]`` times.
    epsilon : float
        Added to the variance.

    Returns
    -------
    Tensor of shape (B, K) or (B, M, K)
    """
    share, flat = weight / weight.sum(), scores.flatten(1)
    centred = flat - share @ flat
    normalized = centred * (share @ centred.square() + epsilon).rsqrt()
    return normalized.view(scores.shape)


def log_density(normalized, gamma):
    r"""Log of a cluster's density, up to a constant that all clusters share, Sec. 5.

    .. math:: \log h_j(x_i) = \log \operatorname{sigmoid}(a^*_{ij} / \gamma)

    Parameters
    ----------
    normalized : Tensor of shape (..., K)
    gamma : float

    Returns
    -------
    Tensor of shape (..., K)
    """
    return logsigmoid(normalized / gamma)


def posterior(normalized):
    r"""The E-step, Sec. 6: a softmax stands for the ratio of the sigmoids.

    .. math:: p_{ij} = e^{a^*_{ij}} \big/ \sum_k e^{a^*_{ik}}

    Parameters
    ----------
    normalized : Tensor of shape (..., K)

    Returns
    -------
    Tensor of shape (..., K)
    """
    return normalized.softmax(dim=-1)


def em_loss(p, normalized, weight, gamma):
    r"""Minus the expected complete log-likelihood, Eq. 6; Eq. 7 adds that of another view.

    .. math:: L = - \sum_i w_i \sum_j p_{ij} \log h_j(x_i)

    Parameters
    ----------
    p : Tensor of shape (B, K) or (B, M, K)
        Posteriors, held constant by the caller.
    normalized : Tensor of shape (B, K) or (B, M, K)
    weight : Tensor of shape (B,)
    gamma : float

    Returns
    -------
    Tensor of shape () or (M,)
    """
    return -weight @ (p * log_density(normalized, gamma)).sum(dim=-1)


def consistency_loss(p, normalized, weight):
    r"""Kullback-Leibler divergence from the posteriors of a row to those of its view, Eq. 8.

    .. math:: \sum_i w_i \sum_j p_{ij} \log \frac{p_{ij}}{q_{ij}}, \qquad
        q_i = \operatorname{softmax}(a^{tr*}_i)

    Parameters
    ----------
    p : Tensor of shape (B, K) or (B, M, K)
        Posteriors of the rows, held constant by the caller.
    normalized : Tensor of shape (B, K) or (B, M, K)
        Standardised scores of their views.
    weight : Tensor of shape (B,)

    Returns
    -------
    Tensor of shape () or (M,)
    """
    return weight @ (torch.xlogy(p, p) - p * normalized.log_softmax(dim=-1)).sum(dim=-1)


# --- Network ---------------------------------------------------------------------------


class NeuralMixtureNetwork(nn.Module):
    """Networks side by side, each of which scores how relevant a row is to each cluster.

    An output is a cluster, or, with more outputs than clusters, a piece of one: all pieces have
    the same prior, a cluster that of its pieces together.

    Attributes
    ----------
    scaler : Standardizer
        Of the features; for images, of pixels to values from 0 to 1.
    members : StackedMLP or Members
        (B, ...) -> (B, n_members, n_outputs).
    score_mean, score_scale : Tensor of shape (n_members, n_outputs)
        Statistics of the scores over all training rows, see `fit_statistics`.
    membership : Tensor of shape (n_members, n_outputs, n_clusters)
        Not zero where an output belongs to a cluster; an output of zeros only is not used.
    """

    def __init__(
        self,
        n_features,
        n_clusters,
        hidden_layer_sizes=(32, 32),
        network=None,
        image_shape=None,
        sobel=True,
        gamma=5.0,
        n_members=1,
        n_outputs=None,
    ):
        super().__init__()
        self.n_members, self.n_clusters = n_members, n_clusters
        self.n_outputs = n_outputs or n_clusters
        self.image_shape, self.sobel, self.gamma = image_shape, sobel, gamma
        self.scaler = Standardizer(n_features, per_feature=image_shape is None)
        self.members = self._make_members(network, hidden_layer_sizes)
        self.register_buffer("score_mean", torch.zeros(n_members, self.n_outputs))
        self.register_buffer("score_scale", torch.ones(n_members, self.n_outputs))
        cluster = torch.arange(self.n_outputs) % n_clusters
        self.register_buffer("membership", torch.eye(n_clusters)[cluster].repeat(n_members, 1, 1))

    @property
    def width(self):
        """Numbers that a row becomes at most."""
        width = max(len(self.scaler.mean), self.n_members * self.n_outputs)
        if isinstance(self.members, StackedMLP):
            return max(width, *(weight[:, 0].numel() for weight in self.members.weights))
        if self.image_shape is None:
            return max(width, widest(self.members))
        # What the first convolution of a network of Table 2 makes of an image.
        return max(width, 64 * math.prod(self.image_shape[1:]))

    @property
    def input_shape(self):
        """Of what a member sees of a row: an int for vectors, a tuple for images."""
        if self.image_shape is None:
            return len(self.scaler.mean)
        return (2, *self.image_shape[1:]) if self.sobel else self.image_shape

    def _make_members(self, network, hidden_layer_sizes):
        shape, n_out = self.input_shape, self.n_outputs
        if network is None and self.image_shape is None:
            return StackedMLP((shape, *hidden_layer_sizes, n_out), self.n_members)
        if network is None:
            network = "mnist" if self.image_shape[0] == 1 else "cifar"
        build = partial(ConvNet, network) if isinstance(network, str) else network
        return Members(make_coder(build, (shape, n_out), "network") for _ in range(self.n_members))

    def init_weights(self, generator, dtype=torch.float32):
        """Draw initial weights, but for modules that came with theirs; refuse wrong shapes.

        They are drawn in float32, and all become ``dtype`` then.
        """
        if isinstance(self.members, StackedMLP):
            self.members.init_weights(generator)
            return self.to(dtype)
        for i, member in enumerate(self.members):
            anew = is_meta(member)
            if anew:
                self.members[i] = materialize(member, generator, scheme="fan-in")
            if not trainable(self.members[i]):
                raise ValueError(
                    f"network has no parameter to train; got {self.members[i]}. Unfreeze some "
                    "(requires_grad), or use a network that has one."
                )
            if self.n_members > 1 and not anew:
                raise ValueError(
                    "network gives a module that has weights already, and "
                    f"{self.n_members} restarts of it would be one model. Set n_init=1, or build "
                    "it anew in each call."
                )
            check_shapes(self.members[i].to(dtype), self.input_shape, self.n_outputs, "network")
        return self.to(dtype)

    def prepare(self, x):
        """What does not change with training: (B, n_features) -> standardised rows or images."""
        x = self.scaler(x)
        return x if self.image_shape is None else x.view(-1, *self.image_shape)

    def scores(self, x):
        """Relevance scores of what `prepare` gives: (B, ...) -> (B, n_members, n_clusters)."""
        if self.image_shape is not None:
            x = sobel(grayscale(x)) if self.sobel else x
            x = x.contiguous(memory_format=torch.channels_last)  # halves the time on a CPU
        return self.members(x)

    def normalized(self, x):
        """Scores standardised by the statistics of the training data, each row by itself."""
        return (self.scores(self.prepare(x)) - self.score_mean) / self.score_scale

    def relevance(self, x):
        """Standardised scores of the clusters, the mean over members: (B, n_features) -> (B, K).

        That of a cluster of several outputs is the log of the sum of their exponentials, so that a
        softmax makes posteriors of one member in either case.
        """
        used = self._used(self.normalized(x))
        if self.n_outputs == self.n_clusters:
            return torch.einsum("bmj,mjk->bk", used, self.membership) / self.n_members
        tiny = torch.finfo(used.dtype).tiny
        log_share = self._cluster_shares(posterior(used)).clamp_min(tiny).log()
        return (log_share + used.logsumexp(dim=2, keepdim=True)).mean(dim=1)

    def member_resp(self, x):
        """Posteriors of the clusters: (B, n_features) -> (B, n_members, n_clusters)."""
        return self._cluster_shares(posterior(self._used(self.normalized(x))))

    def resp(self, x):
        """The mean of `member_resp` over members: (B, n_features) -> (B, n_clusters)."""
        return self.member_resp(x).mean(dim=1)

    def forward(self, x):
        return self.resp(x)

    def em_scores(self, x):
        """Minus the loss of Eq. 6 of each row: (B, n_features) -> (B, n_members)."""
        normalized = self.normalized(x)
        return (posterior(normalized) * log_density(normalized, self.gamma)).sum(dim=2)

    def em_score(self, x):
        """The mean of `em_scores` over members: (B, n_features) -> (B,)."""
        return self.em_scores(x).mean(dim=1)

    def _used(self, normalized):
        if self.n_outputs == self.n_clusters:
            return normalized
        return normalized.masked_fill(self.membership.sum(dim=2) == 0, -math.inf)

    def _cluster_shares(self, p):
        shares = torch.einsum("bmj,mjk->bmk", p, self.membership)
        return shares / shares.sum(dim=2, keepdim=True)

    @torch.no_grad()
    def fit_statistics(self, rows):
        """Set mean and scale of the scores to those over all rows, as a batch of all would have."""

        def sums(batch, weight):
            scores = self.scores(self.prepare(batch)).double().cpu()
            weighted = weight.double().cpu().view(-1, 1, 1) * scores
            return torch.stack([weighted.sum(dim=0), (weighted * scores).sum(dim=0)])

        mean, square = sum_batchwise(sums, rows) / rows.total_weight
        self.score_mean.copy_(mean)
        self.score_scale.copy_(((square - mean.square()).clamp_min(0) + EPSILON).sqrt())
        return self

    def renumber(self, matrices):
        """Map the clusters of each member to others: (n_members, n_clusters, n_clusters)."""
        self.membership.copy_(self.membership @ torch.as_tensor(matrices).to(self.membership))

    def keep(self, member):
        """Drop all members but one, in place."""
        self.n_members, self.members = 1, self.members.select(member)
        for name in ("score_mean", "score_scale", "membership"):
            setattr(self, name, getattr(self, name)[member : member + 1].clone())
        return self

    def select(self, member):
        """One of the members, as a network of its own."""
        return copy.deepcopy(self).keep(member)


# --- Training --------------------------------------------------------------------------


class MixtureEM(Objective):
    """EM on the rows (Eq. 6) or on them and their views (Eq. 7), then consistency (Eq. 8).

    When consistency begins after a warm-up, both optimisers are new.

    Parameters
    ----------
    network : NeuralMixtureNetwork
    view : callable or None
        A random view of a batch that `NeuralMixtureNetwork.prepare` has made. None trains by Eq. 6.
    consistency_learning_rate : float or None
        Of the second phase of Algorithm 1; None has no such phase.
    warm_up : int
        Epochs before it begins.
    """

    even_batches = True
    normalize = staticmethod(normalize)  # what Table 1 takes away

    def __init__(self, network, view=None, consistency_learning_rate=None, warm_up=0):
        self.network, self.view, self.prepare = network, view, network.prepare
        self.consistency_learning_rate = consistency_learning_rate
        self.warm_up = 0 if consistency_learning_rate is None else warm_up
        self.watch = ("em",) if view is None else ("em", "em_view")

    def phases(self):
        parameters = trainable(self.network.members)
        em = Phase(parameters, self.em_step)
        if self.consistency_learning_rate is None or self.warm_up > 0:
            return (em,)
        consistency = Phase(
            parameters, self.consistency_step, learning_rate=self.consistency_learning_rate
        )
        return em, consistency

    def on_epoch_end(self, epoch):
        self.warm_up -= 1
        return self.warm_up == 0

    def em_step(self, batch, index, weight):
        batches = [batch]
        if self.view is not None:
            with torch.no_grad():
                batches.append(self.view(batch))
        self.batches = batches  # the same view serves the second phase
        scores = self.network.scores(torch.cat(batches))
        with full_precision(batch.device):
            first, *views = (self.normalize(a.to(weight), weight) for a in scores.split(len(batch)))
            p = posterior(first.detach())
            terms = {"em": em_loss(p, first, weight, self.network.gamma)}
            if views:
                terms["em_view"] = em_loss(p, views[0], weight, self.network.gamma)
            # No loss: a fall of it means that training runs to uniform posteriors.
            terms["confidence"] = weight @ p.amax(dim=-1)
        return terms

    def consistency_step(self, batch, index, weight):
        batch, view = self.batches
        with torch.no_grad():
            scores = self.network.scores(batch)
        scores_of_view = self.network.scores(view)
        with full_precision(batch.device):
            p = posterior(self.normalize(scores.to(weight), weight))
            of_view = self.normalize(scores_of_view.to(weight), weight)
            return {"consistency": consistency_loss(p, of_view, weight)}


# --- Restarts --------------------------------------------------------------------------


def finite_members(network):
    """Which members have not diverged: ndarray of bool of shape (n_members,)."""
    return torch.isfinite(network.score_scale).all(dim=1).cpu().numpy()


def contingencies(network, rows):
    """Weight of the rows that two members put into two clusters, for all of them at once.

    Parameters
    ----------
    network : NeuralMixtureNetwork
    rows : Rows

    Returns
    -------
    ndarray of shape (n_members, n_clusters, n_members, n_clusters)
    """

    def counts(batch, weight):
        labels = network.member_resp(batch).argmax(dim=2)
        labels = one_hot(labels, network.n_clusters).flatten(1).to(weight)
        return ((labels * weight[:, None]).T @ labels).double().cpu()

    shape = (network.n_members, network.n_clusters) * 2
    return sum_batchwise(counts, rows).view(shape).numpy()


# --- Unequal clusters ------------------------------------------------------------------


def n_pieces(n_clusters, n_rows):
    """Outputs to train where shares are to be learned, of at least five rows each."""
    return min(max(5 * n_clusters, 40), max(2 * n_clusters, n_rows // 5))


class Gaps:
    """Where the data are thin: a graph of neighbours among a sample of the rows.

    Parameters
    ----------
    prepare : callable
        See `NeuralMixtureNetwork.prepare`.
    rows : Rows
    random_state : RandomState
    """

    def __init__(self, prepare, rows, random_state):
        chosen = random_state.permutation(len(rows.visited))[:GRAPH_ROWS]
        self.index = rows.visited[torch.from_numpy(np.sort(chosen))]
        self.graph = neighbour_graph(
            apply_batchwise(lambda x: prepare(x).flatten(1), rows, self.index)
        )

    def merge_outputs(self, network, rows):
        """Make clusters of the outputs of each member: those that touch in dense data are one.

        Sets ``membership``. Outputs that hardly any row belongs to are left out.
        """

        def counts(batch, weight):
            labels = one_hot(network.normalized(batch).argmax(dim=2), network.n_outputs)
            return torch.tensordot(weight, labels.to(weight), dims=1).double().cpu()

        shares = sum_batchwise(counts, rows).numpy() / rows.total_weight
        normalized = apply_batchwise(network.normalized, rows, self.index)
        network.membership.zero_()
        for m, share in enumerate(shares):
            order = np.argsort(-share, kind="stable")
            n_kept = np.count_nonzero(share >= SMALLEST_PIECE / network.n_outputs)
            kept = np.sort(order[: max(n_kept, network.n_clusters)])
            weights = pair_weights(self.graph, normalized[:, m, kept].argmax(axis=1), len(kept))
            clusters = merge(weights, share[kept] + 1 / len(rows.visited), network.n_clusters)
            network.membership[m, kept, clusters] = 1.0

    def cuts(self, network, rows):
        """Normalised cut of each member's clusters: ndarray of shape (n_members,)."""
        labels = apply_batchwise(network.member_resp, rows, self.index).argmax(axis=2)
        weights = [pair_weights(self.graph, column, network.n_clusters) for column in labels.T]
        return np.array([normalized_cut(part) for part in weights]) + NO_CUT


def impose_weights(network, rows, weights):
    r"""Give clusters the prior of Sec. 6, the largest (of all members) the largest weight.

    .. math:: p(z = k \mid x) \propto \pi_k \, f(x \mid z = k), \qquad
        f(x \mid z = k) \propto \hat p(z = k \mid x) / \hat\pi_k

    with the posteriors and their means that training has found under the hats.

    Parameters
    ----------
    network : NeuralMixtureNetwork
    rows : Rows
    weights : ndarray of shape (n_clusters,)
    """

    def sums(batch, weight):
        return torch.tensordot(weight, network.member_resp(batch), dims=1).double().cpu()

    means = sum_batchwise(sums, rows).numpy() / rows.total_weight
    order, identity = np.argsort(weights, kind="stable"), np.eye(len(weights))
    ranks = np.argsort(np.argsort(means.mean(axis=0), kind="stable"))
    network.renumber(identity[order[ranks]] * weights / means[:, :, None])
