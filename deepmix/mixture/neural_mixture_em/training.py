"""EM in mini-batches, the agreement of restarts, and clusters of unequal size.

EM follows Tissera et al. (2022), Secs. 4 to 7; the other parts are not in the paper.
"""

import numpy as np
import torch
from torch.nn.functional import one_hot

from deepmix._torch import apply_batchwise, full_precision, sum_batchwise
from deepmix.mixture.neural_mixture_em import losses
from deepmix.mixture.neural_mixture_em.losses import consistency_loss, em_loss, posterior
from deepmix.networks import (
    trainable,
)
from deepmix.partitions import merge, neighbour_graph, normalized_cut, pair_weights
from deepmix.training import Objective, Phase

# For unequal clusters: the graph joins a sample of GRAPH_ROWS rows, outputs with less than the
# fraction SMALLEST_PIECE of an equal share of the rows are dropped, and NO_CUT is added to cuts so
# that tiny ones tie.
GRAPH_ROWS, SMALLEST_PIECE, NO_CUT = 4000, 0.2, 1e-3


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
        Step size of the second phase of Algorithm 1; None leaves that phase out.
    warm_up : int
        Epochs before the second phase begins.
    """

    even_batches = True
    normalize = staticmethod(losses.normalize)  # replaced in an ablation of Table 1

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
            # Not a part of the loss. Its fall means that training runs to uniform posteriors.
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
    """Contingency tables, in weights of rows, of the clusters of every pair of members.

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
    """Number of outputs to train for learned shares, with five rows or more for each: int."""
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

    where hats mark the posteriors that training has found, and their means.

    Parameters
    ----------
    network : NeuralMixtureNetwork
    rows : Rows
    weights : ndarray of shape (n_clusters,)
    """

    def sums(batch, weight):
        return torch.tensordot(weight, network.member_resp(batch), dims=1).double().cpu()

    # A cluster that no row belongs to has a mean of zero, and no use for a factor.
    means = np.maximum(sum_batchwise(sums, rows).numpy() / rows.total_weight, 1e-12)
    order, identity = np.argsort(weights, kind="stable"), np.eye(len(weights))
    ranks = np.argsort(np.argsort(means.mean(axis=0), kind="stable"))
    network.renumber(identity[order[ranks]] * weights / means[:, :, None])
