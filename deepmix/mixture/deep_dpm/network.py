"""The mixture as a network, alone and on the codes of an autoencoder; subclustering nets."""

from functools import partial

import torch
from torch import nn

from deepmix.autoencoder import AutoencoderNetwork
from deepmix.gaussian_mixture import MixtureModule
from deepmix.networks import MLP, FeatureScaler, build_on_meta, materialize

# Chunk size: a piece of a batch has at most this many rows x clusters x features. In float64 these
# are 4 MiB, which is faster than more, and the memory does not grow with the clusters.
PRODUCTS = 2**19


def piece(means):
    """Rows whose products with all clusters are `PRODUCTS` numbers."""
    return max(16, PRODUCTS // means.numel())


def in_pieces(function, means, *batches):
    """Apply a function of rows to a batch, piece by piece."""
    parts = list(zip(*(batch.split(piece(means)) for batch in batches), strict=True))
    if len(parts) == 1:
        return function(*parts[0])
    return torch.cat([function(*part) for part in parts])


class DPMNetwork(nn.Module):
    """Scaling, mixture and, if amortized, the clustering net.

    Attributes
    ----------
    scaler : FeatureScaler
    mixture : MixtureModule
        Mixture of the scaled rows.
    estimate : Mixture or None
        What ``mixture`` was made of, in float64; None in a network that was built of arrays.
    net : MLP or None
        Logits of the responsibilities.
    """

    def __init__(self, n_features, n_clusters, hidden_layer_sizes=None, full=True, normalize=False):
        super().__init__()
        self.scaler = FeatureScaler(n_features, normalize)
        self.mixture = MixtureModule(n_features, n_clusters, full)
        self.estimate = None
        self.net = None
        if hidden_layer_sizes is not None:
            sizes = (n_features, *hidden_layer_sizes, n_clusters)
            self.net = build_on_meta(lambda: MLP(sizes, negative_slope=0.0))

    @property
    def width(self):
        """Numbers that a row becomes at most."""
        return self.mixture.means.numel()

    def draw(self, generator):
        """Give the net weights from the generator; return the network."""
        if self.net is not None:
            self.net = materialize(self.net, generator)
        return self

    def set_mixture(self, mixture):
        """Predict from a mixture in float64, of scaled rows."""
        self.estimate = mixture
        self.mixture.set(mixture)

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
        """Log density of rows by the mixture, in the units of the data: (B, d) -> (B,)."""
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
        """Glorot-uniform weights, zero biases; drawn on the CPU, now and for clusters to come."""
        self.generator = generator
        for weight in (self.hidden_weight, self.output_weight):
            bound = (6.0 / sum(weight.shape[1:])) ** 0.5
            drawn = torch.empty(weight.shape, dtype=weight.dtype)
            weight.copy_(drawn.uniform_(-bound, bound, generator=generator))
        return self

    @torch.no_grad()
    def inherit(self, origin):
        """A net for each entry of ``origin``: that of its parent if it is the only child."""
        like = self.hidden_weight
        new = SubclusteringNets(like.shape[1], len(origin), like.shape[2])
        new = new.draw(self.generator).to(like)
        kept = (torch.bincount(origin)[origin] == 1).nonzero().squeeze(1)
        for name, old in list(self.named_parameters()):
            values = getattr(new, name)
            values[kept] = old[origin[kept]]
            setattr(self, name, values)

    def log_resp(self, x, labels):
        """Each row by the net of its cluster: (B, d), (B,) -> (B, 2)."""
        hidden = torch.bmm(x[:, None], self.hidden_weight[labels]).squeeze(1)
        hidden = (hidden + self.hidden_bias[labels]).relu()
        logits = torch.bmm(hidden[:, None], self.output_weight[labels]).squeeze(1)
        return (logits + self.output_bias[labels]).log_softmax(dim=1)


class AutoencoderDPMNetwork(AutoencoderNetwork):
    """An autoencoder, and a mixture of its codes.

    Attributes
    ----------
    scaler : Standardizer
    autoencoder : Autoencoder
    clustering : DPMNetwork
        The mixture, with a scaler of the codes.
    error : Tensor of shape ()
        Squared error of a row after pretraining: the unit of the reconstruction.
    shrinkage : Tensor of shape ()
        Share of the clusters in the variance of the codes now, divided by that at the first
        clustering: it scales the prior.
    """

    def __init__(
        self,
        n_features,
        n_clusters,
        latent_dim,
        hidden_layer_sizes,
        clustering_hidden_layer_sizes=None,
        full=True,
        **coders,
    ):
        super().__init__(n_features, latent_dim, hidden_layer_sizes, **coders)
        self.clustering = DPMNetwork(latent_dim, n_clusters, clustering_hidden_layer_sizes, full)
        self.register_buffer("error", torch.ones(()))
        self.register_buffer("shrinkage", torch.ones(()))

    @property
    def width(self):
        return max(super().width, self.clustering.width)

    @property
    def mixture(self):
        return self.clustering.mixture

    def resp(self, x):
        """Responsibilities: (B, n_features) -> (B, n_clusters)."""
        return self.clustering.resp(self.encode(x))

    def log_density(self, x):
        """Log density of the codes of rows: (B, n_features) -> (B,)."""
        return self.clustering.log_density(self.encode(x))
