"""The clustering module as a network, alone and on the codes of an autoencoder."""

import torch
from torch import nn

from deepmix.autoencoder import AutoencoderNetwork
from deepmix.linalg import pinv
from deepmix.networks import Standardizer, Whitener, init_bias


class ClusteringNetwork(nn.Module):
    """Softmax encoder and affine decoder, for ``n_restarts`` models side by side.

    Eq. 6 of Boubekki et al. (2021).

    Attributes
    ----------
    encoder_weight : Tensor of shape (n_features, n_restarts * n_clusters)
    encoder_bias : Tensor of shape (n_restarts * n_clusters,)
    decoder_weight : Tensor of shape (n_restarts, n_clusters, n_features)
    decoder_bias : Tensor of shape (n_restarts, 1, n_features)
    """

    def __init__(self, n_features, n_clusters, n_restarts=1):
        super().__init__()
        self.n_restarts, self.n_clusters = n_restarts, n_clusters
        width = n_restarts * n_clusters
        self.encoder_weight = nn.Parameter(torch.zeros(n_features, width))
        self.encoder_bias = nn.Parameter(torch.zeros(width))
        self.decoder_weight = nn.Parameter(torch.zeros(n_restarts, n_clusters, n_features))
        self.decoder_bias = nn.Parameter(torch.zeros(n_restarts, 1, n_features))

    def centers(self):
        """Images of the unit vectors, bias included: (n_restarts, n_clusters, n_features)."""
        return self.decoder_weight + self.decoder_bias

    def log_resp(self, x):
        """Log-responsibilities: (B, n_features) -> (B, n_restarts, n_clusters)."""
        logits = torch.addmm(self.encoder_bias, x, self.encoder_weight)
        return logits.view(-1, self.n_restarts, self.n_clusters).log_softmax(dim=2)

    def select(self, restart):
        """One of the models, as a network of its own."""
        chosen = ClusteringNetwork(len(self.encoder_weight), self.n_clusters)
        part = slice(restart * self.n_clusters, (restart + 1) * self.n_clusters)
        chosen.encoder_weight.data = self.encoder_weight.data[:, part]
        chosen.encoder_bias.data = self.encoder_bias.data[part]
        chosen.decoder_weight.data = self.decoder_weight.data[restart : restart + 1]
        chosen.decoder_bias.data = self.decoder_bias.data[restart : restart + 1]
        return chosen

    @torch.no_grad()
    def init_random(self, generator, gain=1.0):
        """Draw uniform Glorot kernels and the authors' normal biases; scale logits by ``gain``."""
        fans = self.encoder_weight.shape[0] + self.n_clusters
        bound = (6.0 / fans) ** 0.5
        for kernel in (self.encoder_weight, self.decoder_weight):
            kernel.uniform_(-bound, bound, generator=generator)
        for bias in (self.encoder_bias.view(self.n_restarts, -1), self.decoder_bias):
            init_bias(bias, generator)
        self.encoder_weight.mul_(gain)
        self.encoder_bias.mul_(gain)
        return self

    @torch.no_grad()
    def init_orthonormal(self, generator, gain):
        """Draw orthonormal centres U; set logits ``gain * z @ U.T`` and zero biases.

        With more clusters than latent dimensions only the columns of U are orthonormal.
        """
        nn.init.orthogonal_(self.decoder_weight[0], generator=generator)
        self.decoder_bias.zero_()
        self.encoder_weight.copy_(gain * self.decoder_weight[0].T)
        self.encoder_bias.zero_()
        return self

    @torch.no_grad()
    def init_centers(self, centers, temperature):
        r"""Set the decoder to ``centers`` and the encoder to their posterior.

        .. math:: s_{ik} = 2 \tau x_i^\top \mu_k - \tau \lVert \mu_k \rVert^2

        are, up to a constant, :math:`-\tau \lVert x_i - \mu_k \rVert^2`: the arg-max is the
        nearest centre, for any temperature :math:`\tau`; the paper's covariance I/2 is
        :math:`\tau = 1`.

        Parameters
        ----------
        centers : Tensor of shape (n_restarts, n_clusters, n_features)
        temperature : float
        """
        flat = centers.reshape(-1, centers.shape[2])
        self.decoder_weight.copy_(centers)
        self.decoder_bias.zero_()
        self.encoder_weight.copy_(2 * temperature * flat.T)
        self.encoder_bias.copy_(-temperature * flat.square().sum(dim=1))
        return self

    @torch.no_grad()
    def init_pseudo_inverse(self, centers):
        """The paper's start (Sec. 4.1): the encoder inverts the decoder; biases are zero."""
        self.decoder_weight.copy_(centers)
        self.decoder_bias.zero_()
        self.encoder_weight.copy_(torch.cat(list(pinv(centers)), dim=1))
        self.encoder_bias.zero_()
        return self


class StandardizedClusteringNetwork(nn.Module):
    """A `ClusteringNetwork` on centred and scaled data: what `ClusteringModule` fits."""

    def __init__(self, n_features, n_clusters, n_restarts=1):
        super().__init__()
        self.scaler = Standardizer(n_features)
        self.clustering = ClusteringNetwork(n_features, n_clusters, n_restarts)

    @property
    def width(self):
        """Most numbers that a layer of the network makes of a row: int."""
        return max(self.clustering.encoder_weight.shape)

    def forward(self, x):
        """Responsibilities: (B, n_features) -> (B, n_clusters)."""
        return self.resp(x)

    def resp(self, x):
        return self.clustering.log_resp(self.scaler(x))[:, 0].exp()

    def cluster_centers(self):
        """Centres in the units of the data: (n_clusters, n_features)."""
        return self.scaler.inverse(self.clustering.centers()[0])

    def select(self, restart):
        chosen = StandardizedClusteringNetwork(len(self.scaler.mean), self.clustering.n_clusters)
        chosen.scaler, chosen.clustering = self.scaler, self.clustering.select(restart)
        return chosen


def standardized_variance(network, rows):
    """Total variance of the rows after the network's scaling."""
    return float(rows.moments()[1].sum()) / float(network.scaler.scale) ** 2


class AECMNetwork(AutoencoderNetwork):
    """A clustering module on the codes of an autoencoder (Fig. 2).

    Attributes
    ----------
    scaler : Standardizer
    autoencoder : Autoencoder
    whitener : Whitener
        Maps the codes so that pretrained clusters are round, and their centres of norm about one.
    clustering : ClusteringNetwork
    """

    def __init__(self, n_features, n_clusters, latent_dim, hidden_layer_sizes, **coders):
        super().__init__(n_features, latent_dim, hidden_layer_sizes, **coders)
        self.whitener = Whitener(latent_dim)
        self.clustering = ClusteringNetwork(latent_dim, n_clusters)

    @property
    def width(self):
        return max(super().width, self.clustering.n_clusters)

    def encode(self, x):
        """Whitened codes: (B, n_features) -> (B, latent_dim)."""
        return self.whitener(super().encode(x))

    def decode(self, z):
        """Rows in the units of the data: (B, latent_dim) -> (B, n_features)."""
        return super().decode(self.whitener.inverse(z))

    def resp(self, x):
        """Responsibilities: (B, n_features) -> (B, n_clusters)."""
        return self.log_resp(self.encode(x)).exp()

    def log_resp(self, z):
        return self.clustering.log_resp(z)[:, 0]

    def cluster_centers(self):
        """Decoded centres: (n_clusters, n_features)."""
        return self.decode(self.clustering.centers()[0])
