r"""DeepDPM: a Dirichlet process Gaussian mixture whose responsibilities a network learns.

Ronen, Finder and Freifeld, "DeepDPM: Deep clustering with an unknown number of clusters", CVPR
2022. A clustering net is trained towards the responsibilities of a Gaussian mixture, whose
parameters are MAP estimates under the net's responsibilities; a small net in each cluster finds
two subclusters. Splits and merges, judged by Hastings ratios, change the number of clusters while
training goes on. Implemented: clustering of given features, with and without the nets.
"""

from numbers import Integral, Real

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import nn

from deepmix._torch import load_state, state_to_numpy
from deepmix.base import BaseDeepMixture, Interval, StrOptions
from deepmix.callbacks import EarlyStopping
from deepmix.distributions import (
    NormalInverseWishart,
    soft_statistics,
)
from deepmix.initialization import initial_centers, sample_rows
from deepmix.networks import MLP, FeatureScaler, build_on_meta, check_layer_sizes, materialize
from deepmix.split_merge import (
    CHUNK,
    PROPOSAL,
    Partition,
    ScaledRows,
    Splitter,
    add,
)
from deepmix.training import Objective, Phase

# The prior scale 'auto', in units of the variance of a feature: a floor for each row, so that no
# cluster of all rows is thinner than .3 % of the data's deviation and one of a tenth of them than
# 1 %; and, for up to so many rows, covariances of that share of the variance at the prior's mode.
FLOOR, SHARE, FEW_ROWS = 1e-5, 0.05, 300
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


class GaussianMixtureHead(nn.Module):
    """The mixture, in the form that its densities need.

    Attributes
    ----------
    log_constant : Tensor of shape (K,)
        Log weight plus log of the density at the mean.
    means : Tensor of shape (K, d)
    whiten : Tensor of shape (K, d, d) or (K, d)
        Inverse Cholesky factors, transposed; or inverse deviations.
    """

    def __init__(self, n_features, n_clusters, full=True):
        super().__init__()
        shape = (n_features, n_features) if full else (n_features,)
        self.register_buffer("log_constant", torch.zeros(n_clusters))
        self.register_buffer("means", torch.zeros(n_clusters, n_features))
        self.register_buffer("whiten", torch.zeros(n_clusters, *shape))

    def set(self, weights, means, covariances):
        """Take parameters in float64, of any covariance type and of a new K."""
        n_features = means.shape[1]
        if covariances.dim() == 3:
            factor = torch.linalg.cholesky(covariances)
            identity = torch.eye(n_features, dtype=factor.dtype, device=factor.device)
            whiten = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
            whiten = whiten.mT.contiguous()
            log_det = whiten.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        else:
            whiten = covariances.view(len(means), -1).expand(-1, n_features).rsqrt().contiguous()
            log_det = whiten.log().sum(dim=1)
        constant = weights.log() + log_det - 0.5 * n_features * np.log(2 * np.pi)
        for name, value in (("log_constant", constant), ("means", means), ("whiten", whiten)):
            setattr(self, name, value.to(self.means))
        self.exact = weights, means, covariances

    def log_joint(self, x):
        """Log of weight times density: (B, d) -> (B, K)."""
        return in_pieces(self._log_joint, self.means, x)

    def _log_joint(self, x):
        n_clusters, n_features = self.means.shape
        if self.whiten.dim() == 3:
            z = (x @ self.whiten.permute(1, 0, 2).flatten(1)).view(-1, n_clusters, n_features)
            z = z - (self.means[:, None] @ self.whiten).squeeze(1)
        else:
            z = (x[:, None] - self.means) * self.whiten
        return self.log_constant - 0.5 * z.square().sum(dim=2)


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
        self.hidden_weight = nn.Parameter(torch.zeros(n_clusters, n_features, n_hidden))
        self.hidden_bias = nn.Parameter(torch.zeros(n_clusters, n_hidden))
        self.output_weight = nn.Parameter(torch.zeros(n_clusters, n_hidden, 2))
        self.output_bias = nn.Parameter(torch.zeros(n_clusters, 2))

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


class _Settled(EarlyStopping):
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
        sums = soft_statistics(x, resp, self.partition.prior.covariance_type)
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
        return torch.cat([x, self.network.mixture.log_joint(x).softmax(dim=1)], dim=1)

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
            sums = soft_statistics(x, resp, part.prior.covariance_type)
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


# --- Estimator -------------------------------------------------------------------------


class DeepDPM(BaseDeepMixture):
    """DeepDPM: a mixture of Gaussians that finds the number of its clusters.

    Training begins with ``n_clusters_init`` clusters, any number, and splits and merges them until
    nothing is left that the posterior of a Dirichlet process mixture favours. The
    responsibilities are learnt by a network (``amortized=True``, the paper's method) or computed
    by EM, which is faster and rarely differs. Features of up to a hundred or so dimensions in
    which clusters are compact, such as embeddings, suit it.

    Parameters
    ----------
    n_clusters_init : int, default=1
        Number of clusters to begin with, by k-means.
    max_clusters : int or None, default=None
        No split goes beyond this number.
    amortized : bool, default=True
        Whether a clustering net learns the responsibilities. Without it the mixture is trained
        by EM, and nothing is random but the k-means of the start.
    covariance_type : {'full', 'diag', 'spherical'}, default='full'
        Of the clusters, in the scaled features.
    concentration : float, default=10.0
        Of the Dirichlet process (alpha). Of little influence: a proposal is a matter of hundreds
        of nats, and this enters by its logarithm.
    prior_scale : 'auto', float or array-like, default='auto'
        Scale matrix of the inverse Wishart prior (Psi), in the scaled features: a number for a
        multiple of the identity, an array of shape (n_features,) or (n_features, n_features).
        'auto' is `auto_scale` of the number of rows. The larger it is, the fewer clusters where
        rows are many.
    prior_dof : float or None, default=None
        Its degrees of freedom (nu); None is n_features + 2.
    prior_kappa : float, default=0.05
        Rows that the prior on the means counts for (kappa).
    scaling : {'standard', 'normalize'} or None, default='standard'
        What is done to the rows first: each feature centred and divided by its deviation, so
        that neither units nor offsets matter; or each row divided by its norm, as in the paper.
    check_unions : bool, default=True
        Whether two clusters are also merged where no cut that the search tries would part their
        union. It makes the result independent of ``n_clusters_init``.
    stochastic : bool, default=False
        Whether a proposal of Hastings ratio H < 1 is accepted with probability H, as in the
        paper, or never.
    hidden_layer_sizes : tuple of int, default=(50,)
        Of the clustering net; the subclustering nets have its first one.
    split_merge_every : int, default=300
        Gradient steps between two rounds of proposals, at least.
    freeze : int, default=100
        Gradient steps after an accepted proposal before the mixture is estimated again.
    n_init : int, default=1
        Restarts, one after another: the partition of highest posterior is kept. Where nothing is
        random, by EM from one cluster, there is one.
    max_iter : int, default=2000
        Epochs, at most.
    batch_size : int or 'auto', default='auto'
        Rows in a step; 'auto' is n_samples / 40 between 20 and 256.
    learning_rate_init : float, default=2e-3
        Step size of the clustering net.
    subcluster_learning_rate : float, default=5e-3
        Step size of the subclustering nets.
    tol : float, default=1e-3
        Proposals are made when no larger share of the rows has changed cluster. 0 trains for
        ``max_iter`` epochs, whether proposals are left or not.
    warm_start : bool, default=False
        Whether `fit` goes on from the last solution: from its clusters, scaling and nets, whatever
        ``n_clusters_init`` is.
    device : str or torch.device, default='auto'
        Where to compute.
    dtype : {'float32', 'float64', 'auto'}, default='float32'
        Of the nets in training; 'auto' is that of X. The mixture is estimated in float64.
    random_state : int, RandomState instance or None, default=None
        Determines initial weights and centres and the order of rows.
    verbose : int, default=0
        Print a line every ten epochs (1) or every epoch (10).

    Attributes
    ----------
    n_clusters_ : int
        Number of clusters found.
    labels_ : ndarray of shape (n_samples,)
        Cluster of each training row.
    weights_ : ndarray of shape (n_clusters,)
        Of the mixture.
    means_, cluster_centers_ : ndarray of shape (n_clusters, n_features)
        Of the mixture, in the units of X (of normalised rows if ``scaling='normalize'``).
    covariances_ : ndarray of shape (n_clusters, n_features, n_features) or \
            (n_clusters, n_features)
        Full, or else diagonals: features of unlike units have no spherical covariance.
    proposals_ : ndarray
        Every proposal: a structured array of 'epoch', 'kind' ('split', 'merge', or 'exchange' of
        two clusters for another cut of their union), 'cluster', 'partner', 'log_ratio' (of
        Hastings, or of the posteriors after and before an exchange) and 'accepted'.
    history_ : dict of str to ndarray of shape (`n_iter_`,)
        'loss' and its terms, per row, and 'n_clusters'.
    n_iter_ : int
        Epochs run.
    converged_ : bool
        Whether no proposal was left.
    device_ : str
        Where it was trained.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, where X has strings for column names.

    See Also
    --------
    ClusteringModule : A number of clusters that is given.
    sklearn.mixture.BayesianGaussianMixture : A truncated Dirichlet process, by variational Bayes.

    References
    ----------
    .. [1] M. Ronen, S. E. Finder, O. Freifeld, "DeepDPM: Deep clustering with an unknown number
       of clusters", CVPR 2022.

    Examples
    --------
    >>> from sklearn.datasets import make_blobs
    >>> from deepmix import DeepDPM
    >>> X, y = make_blobs(n_samples=600, centers=5, random_state=1, cluster_std=0.6)
    >>> model = DeepDPM(amortized=False).fit(X)
    >>> model.n_clusters_
    5
    """

    _parameter_constraints: dict = {
        **{
            name: BaseDeepMixture._parameter_constraints[name]
            for name in (
                *("max_iter", "batch_size", "learning_rate_init", "tol", "device", "dtype"),
                *("n_init", "warm_start", "random_state", "verbose"),
            )
        },
        "n_clusters_init": [Interval(Integral, 1, None, closed="left")],
        "max_clusters": [None, Interval(Integral, 1, None, closed="left")],
        "amortized": ["boolean"],
        "covariance_type": [StrOptions({"full", "diag", "spherical"})],
        "concentration": [Interval(Real, 0, None, closed="neither")],
        "prior_scale": [
            StrOptions({"auto"}),
            Interval(Real, 0, None, closed="neither"),
            "array-like",
        ],
        "prior_dof": [None, Interval(Real, 0, None, closed="neither")],
        "prior_kappa": [Interval(Real, 0, None, closed="neither")],
        "scaling": [StrOptions({"standard", "normalize"}), None],
        "check_unions": ["boolean"],
        "stochastic": ["boolean"],
        "hidden_layer_sizes": ["array-like"],
        "split_merge_every": [Interval(Integral, 1, None, closed="left")],
        "freeze": [Interval(Integral, 0, None, closed="left")],
        "subcluster_learning_rate": [Interval(Real, 0, None, closed="neither")],
    }
    _network_class = DPMNetwork
    _transform_output = "resp"
    _n_clusters_parameter = "n_clusters_init"

    def __init__(
        self,
        n_clusters_init=1,
        *,
        max_clusters=None,
        amortized=True,
        covariance_type="full",
        concentration=10.0,
        prior_scale="auto",
        prior_dof=None,
        prior_kappa=0.05,
        scaling="standard",
        check_unions=True,
        stochastic=False,
        hidden_layer_sizes=(50,),
        split_merge_every=300,
        freeze=100,
        n_init=1,
        max_iter=2000,
        batch_size="auto",
        learning_rate_init=2e-3,
        subcluster_learning_rate=5e-3,
        tol=1e-3,
        warm_start=False,
        device="auto",
        dtype="float32",
        random_state=None,
        verbose=0,
    ):
        self.n_clusters_init = n_clusters_init
        self.max_clusters = max_clusters
        self.amortized = amortized
        self.covariance_type = covariance_type
        self.concentration = concentration
        self.prior_scale = prior_scale
        self.prior_dof = prior_dof
        self.prior_kappa = prior_kappa
        self.scaling = scaling
        self.check_unions = check_unions
        self.stochastic = stochastic
        self.hidden_layer_sizes = hidden_layer_sizes
        self.split_merge_every = split_merge_every
        self.freeze = freeze
        self.n_init = n_init
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.subcluster_learning_rate = subcluster_learning_rate
        self.tol = tol
        self.warm_start = warm_start
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    @classmethod
    def from_paper(cls, n_samples, **parameters):
        """Make an estimator with the schedule of the authors' program.

        Normalised rows, a prior scale of 0.005, batches of 128, a learning rate of 5e-4, a round
        of proposals every 30 epochs with the mixture frozen for 5, proposals accepted with
        probability min(1, H), no check of unions, 500 epochs.

        Parameters
        ----------
        n_samples : int
            Rows that it will be fitted to: they make epochs into steps.
        **parameters
            Override any of these settings.

        Returns
        -------
        estimator : DeepDPM
        """
        steps = max(1, -(-n_samples // 128))
        settings = {
            "prior_scale": 0.005,
            "prior_kappa": 1e-4,
            "scaling": "normalize",
            "check_unions": False,
            "stochastic": True,
            "split_merge_every": 30 * steps,
            "freeze": 5 * steps,
            "max_iter": 500,
            "batch_size": 128,
            "learning_rate_init": 5e-4,
            "tol": 1.0,
        }
        return cls(**{**settings, **parameters})

    def score_samples(self, X):
        """Log-density of each row under the mixture.

        Parameters
        ----------
        X : {array-like, sparse matrix, torch.Tensor} of shape (n_samples, n_features)

        Returns
        -------
        log_density : ndarray of shape (n_samples,)
            In nats, for data in the units of X.
        """
        return self._apply("log_density", self._check_data(X))

    def sample(self, n_samples=1):
        """Draw rows from the mixture.

        Parameters
        ----------
        n_samples : int, default=1

        Returns
        -------
        X : ndarray of shape (n_samples, n_features)
        labels : ndarray of shape (n_samples,)
            Cluster that each row was drawn from.
        """
        check_is_fitted(self)
        labels, noise = self._draw(n_samples, self.n_features_in_)
        if self.covariances_.ndim == 3:
            factor = np.linalg.cholesky(self.covariances_)[labels]
            return self.means_[labels] + np.einsum("nij,nj->ni", factor, noise), labels
        return self.means_[labels] + np.sqrt(self.covariances_)[labels] * noise, labels

    # --- Hooks of the base class -----------------------------------------------------

    @property
    def _n_features_out(self):
        return self.n_clusters_

    def _n_restarts(self):
        random = self.amortized or self.stochastic or self.n_clusters_init > 1
        return super()._n_restarts() if random else 1

    def _row_width(self, n_features):
        return n_features * self._arguments["n_clusters"]

    def _check_continuation(self, rows):
        super()._check_continuation(rows)
        for name, before in self._continued.items():
            now = getattr(self, name)
            if now != before:
                raise ValueError(
                    f"Training goes on with a model of {name}={before!r}; got {name}={now!r}. "
                    "Call fit with warm_start=False to start anew."
                )

    def _training_dtype(self, X):
        # Without nets nothing is gained by fewer digits.
        return super()._training_dtype(X) if self.amortized else torch.float64

    def _check_parameters(self):
        super()._check_parameters()
        check_layer_sizes(self.hidden_layer_sizes)
        if len(self.hidden_layer_sizes) == 0:
            raise ValueError(
                "hidden_layer_sizes must hold one or more integers >= 1; got "
                f"{self.hidden_layer_sizes!r}. (50,) is the paper's."
            )
        if self.max_clusters is not None and self.max_clusters < self.n_clusters_init:
            raise ValueError(
                f"max_clusters={self.max_clusters} should be >= n_clusters_init="
                f"{self.n_clusters_init}. Raise the one or lower the other."
            )

    def _network_arguments(self, n_features):
        return {
            "n_features": n_features,
            "n_clusters": self._n_clusters_to_begin_with(),
            "hidden_layer_sizes": tuple(self.hidden_layer_sizes) if self.amortized else None,
            "full": self.covariance_type == "full",
            "normalize": self.scaling == "normalize",
        }

    def _n_clusters_to_begin_with(self):
        return self._arguments["n_clusters"] if self._continues() else self.n_clusters_init

    def _fitted_arguments(self, network, rows):
        arguments = self._network_arguments(rows.n_features)
        return {**arguments, "n_clusters": len(network.mixture.means)}

    def _init_network(self, rows, n_restarts, random_state, generator):
        network = DPMNetwork(**self._network_arguments(rows.n_features))
        if network.net is not None:
            network.net = materialize(network.net, generator)
        network = network.to(rows.dtype)
        if self.scaling == "standard":
            network.scaler.fit(*rows.moments())
        return network

    def _train(self, network, rows, generator, random_state, reports):
        data = ScaledRows(rows, network.scaler)
        prior = self._prior(data)
        splitter = Splitter(data, prior, float(np.log(self.concentration)))
        draws = generator if self.stochastic else None
        partition = Partition(data, prior, splitter, self.max_clusters, self.check_unions, draws)
        if self._continues():
            labels = data.map(lambda x, part: network.labels(x.to(rows.dtype)))
            partition.resume(labels, *mixture_to_scaled(self, network))
        else:
            partition.start(self._initial_labels(data, network, rows, random_state))
        objective = self._objective(network, partition, generator)
        options = {"generator": generator if self.amortized else None}
        if not self.amortized:
            options["batch_size"] = max(256, CHUNK // rows.n_features)
        history = self._minimize(
            objective,
            network,
            rows,
            reports,
            max_iter=self.max_iter,
            may_stop=False,
            callbacks=[_Settled(objective)] if self.tol > 0 else [],
            **options,
        )
        objective.finish()
        network.log_posterior = partition.score()
        network.subnets_state = objective.subnets_state()
        network.proposals = np.array(partition.proposals, dtype=PROPOSAL)
        network.n_clusters = np.array(objective.n_clusters[: history.n_iter], dtype=int)
        return history

    def _objective(self, network, partition, generator):
        if not self.amortized:
            return MixtureObjective(network, partition, self.tol)
        like = network.mixture.means
        subnets = SubclusteringNets(like.shape[1], partition.n_clusters, self.hidden_layer_sizes[0])
        subnets.draw(generator)
        if self._continues():
            load_state(subnets, self._subnets_state)
        else:
            network.inherit(torch.arange(partition.n_clusters) % self.n_clusters_init)
        return AmortizedObjective(
            network,
            partition,
            self.tol,
            subnets=subnets.to(like),
            generator=generator,
            split_merge_every=self.split_merge_every,
            freeze=self.freeze,
            rate=self.subcluster_learning_rate,
        )

    def _initial_labels(self, data, network, rows, random_state):
        if self.n_clusters_init == 1:
            return torch.zeros(len(data), dtype=torch.long, device=rows.device)
        X, weight = sample_rows(rows, network.scaler, self.n_clusters_init, random_state)
        centers = initial_centers("k-means", X, self.n_clusters_init, random_state, weight)
        centers = torch.tensor(centers, dtype=torch.float64, device=rows.device)
        labels = data.map(lambda x, part: torch.cdist(x, centers).argmin(dim=1))
        return labels.unique(return_inverse=True)[1]

    def _prior(self, data):
        """The normal-inverse-Wishart prior, around the mean of the scaled rows."""
        mean = add(data.weight[part] @ x for part, x in data.chunks()) / data.total_weight
        n_features = len(mean)
        dof = n_features + 2.0 if self.prior_dof is None else float(self.prior_dof)
        if self.covariance_type == "full" and dof <= n_features - 1:
            raise ValueError(
                f"prior_dof={self.prior_dof} should be > n_features - 1 = {n_features - 1}. "
                "Leave it at None for n_features + 2."
            )
        scale = self._prior_scale(data.total_weight, n_features)
        kappa, dof = mean.new_tensor(self.prior_kappa), mean.new_tensor(dof)
        return NormalInverseWishart(mean, kappa, dof, mean.new_tensor(scale))

    def _prior_scale(self, total_weight, n_features):
        if isinstance(self.prior_scale, str):
            scale = np.full(n_features, auto_scale(total_weight, n_features))
        else:
            scale = np.asarray(self.prior_scale, dtype=np.float64)
            scale = np.full(n_features, float(scale)) if scale.ndim == 0 else scale
        diagonal = scale.diagonal() if scale.ndim == 2 else scale
        valid = scale.shape in ((n_features,), (n_features, n_features))
        valid = valid and bool(np.all(np.isfinite(scale)) and np.all(diagonal > 0))
        if valid and scale.ndim == 2:
            valid = np.allclose(scale, scale.T) and np.linalg.eigvalsh(scale)[0] > 0
        if not valid:
            raise ValueError(
                f"prior_scale must be 'auto', a positive number, or an array of shape "
                f"({n_features},) or ({n_features}, {n_features}) that is positive definite; got "
                f"{self.prior_scale!r}."
            )
        if self.covariance_type == "full":
            return scale if scale.ndim == 2 else np.diag(scale)
        # One variance for all features is informed by each of them.
        return diagonal if self.covariance_type == "diag" else diagonal.sum()

    def _criterion(self, network, rows):
        values = torch.stack([v.sum() for v in network.mixture.exact])
        return -network.log_posterior if torch.isfinite(values).all() else np.inf

    def _fitted_attributes(self, network, rows, restart=0):
        attributes = super()._fitted_attributes(network, rows, restart)
        return {**attributes, **mixture_attributes(network)}

    def _set_fitted(self, network, history, restart, rows, X):
        super()._set_fitted(network, history, restart, rows, X)
        self.history_["n_clusters"] = network.n_clusters
        self.proposals_ = network.proposals
        self._subnets_state = network.subnets_state
        self._continued = {name: getattr(self, name) for name in ("covariance_type", "scaling")}

    def _concerns(self, history):
        ended = self.converged_ or history.interrupted or history.stopped
        if not ended and self.tol > 0:
            yield (
                f"DeepDPM did not settle in max_iter={self.max_iter} epochs: splits or merges "
                "may be left. Increase max_iter, or set tol=0 to train for max_iter epochs and "
                "nothing else."
            )


def auto_scale(n_rows, n_features):
    r"""Scale of the prior for features of variance one.

    .. math:: 10^{-5} n + 0.05 \, (2 d + 4) \min(1, 300 / n)

    The first part rules where rows are many: the thinnest cluster of a given share of the rows is
    the same for any number of them, so that more rows of the same data find no more clusters. The
    second rules where they are few: there the prior of a cluster must be of the size of a cluster,
    or each new one costs too much.

    Parameters
    ----------
    n_rows : float
        Total weight.
    n_features : int

    Returns
    -------
    float
    """
    return FLOOR * n_rows + SHARE * (2 * n_features + 4) * min(1.0, FEW_ROWS / n_rows)


def mixture_attributes(network):
    """Weights, means and covariances in the units of the data: dict of ndarray."""
    weights, means, covariances = (v.cpu().double().numpy() for v in network.mixture.exact)
    scale = network.scaler.scale.cpu().double().numpy()
    if covariances.ndim == 3:
        covariances = covariances * scale[:, None] * scale
    else:
        covariances = covariances.reshape(len(means), -1) * scale**2
    means = means * scale + network.scaler.mean.cpu().double().numpy()
    return {
        "weights_": weights / weights.sum(),
        "means_": means,
        "cluster_centers_": means.copy(),
        "covariances_": covariances,
    }


def mixture_to_scaled(model, network):
    """Weights, means and covariances of a fitted model, scaled: the inverse of the above."""
    like, scaler = network.mixture.means, network.scaler
    scale, shift = (v.double() for v in (scaler.scale, scaler.mean))
    weights, means, covariances = (
        torch.tensor(np.asarray(v), dtype=torch.float64, device=like.device)
        for v in (model.weights_, model.means_, model.covariances_)
    )
    if covariances.dim() == 3:
        covariances = covariances / scale[:, None] / scale
    else:
        covariances = covariances / scale.square()
        if model.covariance_type == "spherical":
            covariances = covariances.mean(dim=1)
    return weights, (means - shift) / scale, covariances
