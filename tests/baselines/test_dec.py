"""DEC: equations, where it starts, what training does, when it stops."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch import nn

from deepmix.baselines import DEC
from deepmix.baselines.dec import divergence, similarity, target_distribution

RTOL = 1e-10
IDENTITY = {"encoder": nn.Identity(), "decoder": nn.Identity()}


def example(n=9, k=4, p=3):
    draw = np.random.default_rng(0)
    return draw.normal(size=(n, p)), draw.normal(size=(k, p)), draw.integers(1, 4, n).astype(float)


def test_similarity_and_target_equal_naive_loops():
    z, centers, weight = example()
    s = np.array([[1 / (1 + sum((a - b) ** 2)) for b in centers] for a in z])
    np.testing.assert_allclose(similarity(torch.tensor(z), torch.tensor(centers)), s, rtol=RTOL)
    q = s / s.sum(axis=1, keepdims=True)
    size = [sum(weight[i] * q[i, k] for i in range(9)) for k in range(4)]
    p = np.array([[q[i, k] ** 2 / size[k] for k in range(4)] for i in range(9)])
    p /= p.sum(axis=1, keepdims=True)
    got = target_distribution(torch.tensor(q), torch.tensor(weight))
    np.testing.assert_allclose(got, p, rtol=RTOL)


def test_the_divergence_is_that_of_scipy_and_vanishes_at_the_target():
    draw = np.random.default_rng(1)
    p, q, weight = draw.dirichlet(np.ones(4), 9), draw.dirichlet(np.ones(4), 9), draw.random(9)
    got = divergence(*(torch.tensor(v) for v in (p, q, weight)))
    expected = weight @ [stats.entropy(a, b) for a, b in zip(p, q)]
    assert float(got) == pytest.approx(expected, rel=RTOL)
    same = divergence(*(torch.tensor(v) for v in (p, p, weight)))
    assert float(same) == pytest.approx(0, abs=1e-12)


def test_a_target_of_sharp_assignments_of_equal_sizes_is_what_it_was():
    sharp = torch.eye(3, dtype=torch.float64).repeat(4, 1)
    torch.testing.assert_close(target_distribution(sharp, torch.ones(12).double()), sharp)


def test_it_starts_as_k_means_on_the_codes(overlapping):
    X, _ = overlapping
    model = DEC(4, latent_dim=4, max_iter=0, tol=0, scale=False, **IDENTITY).fit(X)
    kmeans = KMeans(4, init=model.latent_centers_, n_init=1).fit(X)
    np.testing.assert_allclose(model.latent_centers_, kmeans.cluster_centers_, rtol=1e-4)
    np.testing.assert_array_equal(model.labels_, kmeans.labels_)
    np.testing.assert_allclose(model.cluster_centers_, model.latent_centers_, rtol=1e-6)


def test_training_sharpens_assignments(blobs):
    X, y = blobs
    options = {"hidden_layer_sizes": (16,), "latent_dim": 2, "tol": 0, "random_state": 0}
    start, end = (DEC(4, max_iter=n, **options).fit(X) for n in (0, 30))
    sharpness = [model.predict_proba(X).max(axis=1).mean() for model in (start, end)]
    assert sharpness[1] > sharpness[0] + 0.02
    assert adjusted_rand_score(y, end.labels_) == 1.0


def test_it_stops_when_rows_stay(blobs):
    options = {"hidden_layer_sizes": (16,), "latent_dim": 2, "random_state": 0}
    model = DEC(4, **options).fit(blobs[0])
    assert model.converged_
    assert model.n_iter_ < 20
    late = DEC(4, update_every=5, **options).fit(blobs[0])
    assert late.n_iter_ >= 6  # the second target is the first that can be compared
