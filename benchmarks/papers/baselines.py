"""What the papers' methods are compared with on the rows as they are."""

from dataclasses import dataclass
from functools import partial

import scipy.sparse as sp
import torch
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

# With more features than this, full covariances of ten clusters have more entries than most of
# the data sets have numbers.
MAX_FULL_COVARIANCE = 300

# Makes the annotated fields of an estimator its parameters.
parameters = partial(dataclass, eq=False, repr=False)


def k_means(n_clusters, init="k-means++", n_init=1):
    return KMeans(n_clusters, init=init, n_init=n_init)


def spherical_mixture(n_clusters, init="k-means++"):
    return GaussianMixture(n_clusters, covariance_type="spherical", init_params=init)


def full_mixture(n_clusters, n_features, reg_covar=1e-3):
    """A full-covariance mixture started from k-means, or the reason why there is none."""
    if n_features > MAX_FULL_COVARIANCE:
        return f"not run: {n_features} features are too many for full covariances"
    return GaussianMixture(n_clusters, init_params="kmeans", reg_covar=reg_covar)


def encode(encoder, X):
    """Codes of dense or CSR rows by a module, on its device: ndarray of (n_samples, latent_dim)."""
    device = next(encoder.parameters()).device
    with torch.inference_mode():
        batches = (X[i : i + 4096] for i in range(0, X.shape[0], 4096))
        dense = (b.toarray() if sp.issparse(b) else b for b in batches)
        codes = [encoder(torch.as_tensor(b, dtype=torch.float32, device=device)) for b in dense]
    return torch.cat(codes).cpu().numpy()
