"""The network whose outputs are the densities of the clusters, or several side by side."""

import copy
import math
from functools import partial

import torch
from torch import nn

from deepmix._torch import sum_batchwise
from deepmix.augmentation import grayscale, sobel
from deepmix.mixture.neural_mixture_em.losses import EPSILON, log_density, posterior
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


class NeuralMixtureNetwork(nn.Module):
    """Networks side by side, each of which scores how relevant a row is to each cluster.

    An output is a cluster, or, with more outputs than clusters, a piece of one: all pieces have
    the same prior, a cluster that of its pieces together.

    Attributes
    ----------
    scaler : Standardizer
        Standardises the features; for images, maps pixels to values from 0 to 1.
    members : StackedMLP or Members
        Networks side by side: (B, ...) -> (B, n_members, n_outputs).
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
        """Most numbers that a layer of the network makes of a row: int."""
        width = max(len(self.scaler.mean), self.n_members * self.n_outputs)
        if isinstance(self.members, StackedMLP):
            return max(width, *(weight[:, 0].numel() for weight in self.members.weights))
        if self.image_shape is None:
            return max(width, widest(self.members))
        # The first convolution of a network of Table 2 makes 64 channels of an image.
        return max(width, 64 * math.prod(self.image_shape[1:]))

    @property
    def input_shape(self):
        """Shape in which members see a row: an int for vectors, a tuple for images."""
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

        Weights are drawn in float32 and then converted to ``dtype``.
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
        """Standardised rows, or images: (B, n_features) -> (B, ...). No trained weights enter."""
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
        """Multiply the memberships by matrices (n_members, n_clusters, n_clusters)."""
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
