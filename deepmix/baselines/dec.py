r"""DEC: an encoder is trained towards a sharpened version of its own soft assignment.

Xie, Girshick and Farhadi, "Unsupervised deep embedding for clustering analysis", ICML 2016.
"""

from dataclasses import KW_ONLY

import numpy as np
import torch
from torch import nn

from deepmix import parameters as p
from deepmix._torch import gather_batchwise
from deepmix.autoencoder import AutoencoderMixture, AutoencoderNetwork, decoded
from deepmix.callbacks import StopWhen
from deepmix.fitting import Trained
from deepmix.kmeans import initial_centers, sample_rows
from deepmix.networks import trainable
from deepmix.training import History, Objective, Phase

# --- Losses ----------------------------------------------------------------------------


def similarity(z, centers):
    r"""Student's kernel of one degree of freedom: (B, p), (K, p) -> (B, K).

    .. math:: s_{ik} = (1 + \lVert z_i - \mu_k \rVert^2)^{-1}

    The soft assignment of Eq. 1 is :math:`q_{ik} = s_{ik} / \sum_l s_{il}`.
    """
    return 1 / (1 + (z[:, None] - centers).square().sum(dim=2))


def target_distribution(resp, weight):
    r"""Eq. 3: assignments squared, and divided by the size of their cluster.

    .. math:: p_{ik} = \frac{q_{ik}^2 / f_k}{\sum_l q_{il}^2 / f_l}, \quad f_k = \sum_i w_i q_{ik}
    """
    sharpened = resp.square() / (weight @ resp)
    return sharpened / sharpened.sum(dim=1, keepdim=True)


def divergence(target, resp, weight):
    r"""Eq. 2: :math:`\sum_i w_i \sum_k p_{ik} \log (p_{ik} / q_{ik})`."""
    return weight @ (torch.xlogy(target, target) - target * resp.log()).sum(dim=1)


# --- Network and training --------------------------------------------------------------


class DECNetwork(AutoencoderNetwork):
    """An autoencoder, and centres among its codes."""

    def __init__(self, n_features, n_clusters, latent_dim, hidden_layer_sizes, **coders):
        super().__init__(n_features, latent_dim, hidden_layer_sizes, **coders)
        self.centers = nn.Parameter(torch.zeros(n_clusters, latent_dim))

    def resp(self, x):
        """Soft assignments, Eq. 1: (B, n_features) -> (B, n_clusters)."""
        s = similarity(self.encode(x), self.centers)
        return s / s.sum(dim=1, keepdim=True)

    def nearness(self, x):
        """Log of the summed similarities: (B, n_features) -> (B,)."""
        return similarity(self.encode(x), self.centers).sum(dim=1).log()


class SharpeningObjective(Objective):
    """The loss of Eq. 2, whose target is computed anew every ``update_every`` epochs."""

    def __init__(self, network, rows, update_every):
        self.network, self.rows, self.update_every = network, rows, update_every
        self.labels, self.moved = None, 1.0

    def phases(self):
        encoder = trainable(self.network.autoencoder.encoder)
        return (Phase((*encoder, self.network.centers), self.step),)

    def on_epoch_start(self, epoch):
        if epoch % self.update_every == 0:
            resp, before = gather_batchwise(self.network.resp, self.rows), self.labels
            self.target = target_distribution(resp, self.rows.weight)
            self.labels = resp.argmax(dim=1)
            if before is not None:
                changed = (before != self.labels).to(self.rows.weight)
                self.moved = float(changed @ self.rows.weight) / self.rows.total_weight

    def step(self, batch, index, weight):
        return {"divergence": divergence(self.target[index], self.network.resp(batch), weight)}


# --- Estimator -------------------------------------------------------------------------


@p.parameters
class DEC(AutoencoderMixture):
    """Deep embedded clustering: k-means on codes, then an encoder that sharpens its clusters.

    Parameters
    ----------
    n_clusters : int, default=8
        Number of clusters.
    hidden_layer_sizes : tuple of int, default=(500, 500, 2000)
        Layers of the encoder between data and codes; the decoder has them in reverse.
    latent_dim : int, default=10
        Dimension of the codes.
    encoder, decoder : callable, torch.nn.Module or None, default=None
        Networks to use instead of ``hidden_layer_sizes``, as in `AECM`.
    pretrain_max_iter, max_iter : int, default=50, 100
        Epochs of the autoencoder alone, and of the encoder after it, at most.
    update_every : int, default=1
        Epochs between two updates of the target distribution.
    n_init : int, default=1
        Restarts; the one of lowest divergence is kept.
    batch_size, learning_rate_init : default='auto', 1e-3
        Rows in a step, where 'auto' is n_samples / 40 between 20 and 256; step size of Adam.
    tol : float, default=1e-3
        Training ends when no larger share of the rows has changed cluster between two updates.
    scale, precision, warm_start, device, dtype, random_state, verbose
        As in `AECM`.

    Attributes
    ----------
    latent_centers_, cluster_centers_ : ndarray of shape (n_clusters, latent_dim or n_features)
        Centres among the codes, and decoded.
    labels_, weights_, n_clusters_, history_, n_iter_, converged_, device_
        As in `AECM`.

    References
    ----------
    .. [1] J. Xie, R. Girshick, A. Farhadi, "Unsupervised deep embedding for clustering analysis",
       ICML 2016.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from deepmix.baselines import DEC
    >>> X = load_iris().data
    >>> DEC(3, hidden_layer_sizes=(16,), latent_dim=2, random_state=0).fit_predict(X).shape
    (150,)
    """

    n_clusters: p.Count = 8
    _: KW_ONLY
    hidden_layer_sizes: p.Layers = (500, 500, 2000)
    latent_dim: p.Count = 10
    encoder: p.Coder | None = None
    decoder: p.Coder | None = None
    pretrain_max_iter: p.CountOrZero = 50
    max_iter: p.CountOrZero = 100
    update_every: p.Count = 1
    n_init: p.Count = 1
    batch_size: p.Count | p.Auto = "auto"
    learning_rate_init: p.Positive = 1e-3
    tol: p.NonNegative = 1e-3
    scale: bool = True
    precision: p.Precision = "float32"
    warm_start: bool = False
    device: p.Device = "auto"
    dtype: p.Dtype = "float32"
    random_state: p.RandomState = None
    verbose: p.Verbosity = 0

    _network_class, _transform_output = DECNetwork, "encode"

    def score_samples(self, X: p.Matrix) -> np.ndarray:
        """Log of the summed similarities: it orders the rows of one model, and is no density."""
        return self._apply("nearness", self._check_data(X))

    def _train(self, fit, network):
        before = self._pretrain(fit, network, may_stop=False)
        if not fit.continues:
            n_clusters, random_state = self.n_clusters, fit.rng.numpy
            z, w = sample_rows(fit.rows, network.eval().encode, n_clusters, random_state)
            centers = initial_centers("k-means", z, n_clusters, random_state, w, n_init=20)
            network.centers.data.copy_(torch.from_numpy(centers))
        history = History(interrupted=before.interrupted)
        objective = SharpeningObjective(network.train(), fit.rows, self.update_every)
        if not before.interrupted:
            settled = [StopWhen(lambda: objective.moved <= self.tol)] if self.tol > 0 else []
            stage = {"max_iter": self.max_iter, "may_stop": False, "callbacks": settled}
            history = self._minimize(fit, network, objective, **stage)
        resp, weight = gather_batchwise(network.eval().resp, fit.rows), fit.rows.weight
        criterion = divergence(target_distribution(resp, weight), resp, weight)
        shares = {"weights_": (weight @ resp / weight.sum()).double().cpu().numpy()}
        return Trained(network, history.after(before), float(criterion), attributes=shares)

    def _fitted_attributes(self, fit, network, restart=0):
        attributes = super()._fitted_attributes(fit, network, restart)
        centers = network.centers.detach()
        latent = centers.double().cpu().numpy().copy()
        decoded_centers = decoded(network, centers)
        return {**attributes, "latent_centers_": latent, "cluster_centers_": decoded_centers}
