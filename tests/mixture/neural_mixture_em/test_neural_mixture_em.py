"""NeuralMixtureEM: equations, oracles, limits, views, restarts, images, errors."""

import math

import numpy as np
import pytest
import torch
from common import rows_of
from scipy.special import expit, softmax
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, make_blobs, make_moons
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from torch import nn

from deepmix import NeuralMixtureEM
from deepmix._torch import Rows
from deepmix.augmentation import ImageAugmentation
from deepmix.metrics import clustering_accuracy
from deepmix.mixture.neural_mixture_em.losses import (
    consistency_loss,
    em_loss,
    log_density,
    normalize,
    posterior,
)
from deepmix.mixture.neural_mixture_em.network import NeuralMixtureNetwork
from deepmix.mixture.neural_mixture_em.training import (
    MixtureEM,
    contingencies,
    impose_weights,
    n_pieces,
)
from deepmix.partitions import stability
from deepmix.training import minimize

RTOL = 1e-10
GAMMA = 5.0


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def example(n=13, members=2, k=4, seed=0):
    """Scores of no structure at all, and weights."""
    draw = np.random.default_rng(seed)
    scores = torch.tensor(3 * draw.normal(size=(n, members, k)) + draw.normal(size=k))
    return scores, torch.tensor(draw.integers(1, 4, n).astype(float))


def naive_normalize(scores, weight, epsilon=1e-5):
    """Sec. 5 by loops, rows repeated as often as they count."""
    out = np.empty_like(scores)
    for m in range(scores.shape[1]):
        for j in range(scores.shape[2]):
            column = np.repeat(scores[:, m, j], weight.astype(int))
            mean = sum(column) / len(column)
            variance = sum((a - mean) ** 2 for a in column) / len(column)
            out[:, m, j] = [(a - mean) / math.sqrt(variance + epsilon) for a in scores[:, m, j]]
    return out


# --- Equations ---


def test_normalized_scores_equal_a_naive_loop():
    scores, weight = example()
    expected = naive_normalize(scores.numpy(), weight.numpy())
    np.testing.assert_allclose(normalize(scores, weight), expected, rtol=RTOL)


def test_normalized_scores_have_mean_zero_and_lie_within_the_bound_of_the_batch():
    scores, _ = example(n=128, k=3)
    scores[5] = 1e4  # the bound is reached by one row far from all others
    normalized = normalize(scores, torch.ones(128).double())
    assert normalized.mean(dim=0).abs().max() < 1e-12
    assert normalized.max().item() == pytest.approx(math.sqrt(127), rel=1e-5)


def test_the_gradient_flows_through_the_statistics():
    scores, weight = example()
    scores.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda a: normalize(a, weight), scores)
    # A shift or a scale of all scores changes nothing, so that the gradient is orthogonal to both.
    p = posterior(normalize(scores.detach(), weight))
    (gradient,) = torch.autograd.grad(
        em_loss(p, normalize(scores, weight, 0.0), weight, GAMMA).sum(), scores
    )
    assert gradient.abs().max() > 1e-2
    assert gradient.sum(dim=0).abs().max() < 1e-12
    assert (gradient * scores).sum(dim=0).abs().max() < 1e-12


def test_densities_and_posteriors_equal_their_formulas():
    normalized = example()[0]
    np.testing.assert_allclose(
        log_density(normalized, GAMMA).exp(), expit(normalized.numpy() / GAMMA), rtol=RTOL
    )
    expected = softmax(normalized.numpy(), axis=-1)
    np.testing.assert_allclose(posterior(normalized), expected, rtol=RTOL)


def test_the_density_of_a_far_row_keeps_its_logarithm():
    far = torch.tensor([[-1e4, 0.0]])
    assert log_density(far, GAMMA)[0, 0].item() == pytest.approx(-2000)


def test_the_loss_of_eq_6_equals_a_naive_loop():
    scores, weight = example()
    p = posterior(example(seed=1)[0])
    expected = np.zeros(2)
    for i, w in enumerate(weight.numpy()):
        for m in range(2):
            for j in range(4):
                h = 1 / (1 + math.exp(-scores[i, m, j].item() / GAMMA))
                expected[m] -= w * p[i, m, j].item() * math.log(h)
    np.testing.assert_allclose(em_loss(p, scores, weight, GAMMA), expected, rtol=RTOL)


def test_the_divergence_of_eq_8_equals_a_naive_loop():
    scores, weight = example()
    p, q = posterior(example(seed=1)[0]).numpy(), posterior(scores).numpy()
    p[0, 0] = [1.0, 0.0, 0.0, 0.0]  # 0 log 0 is 0
    expected = np.zeros(2)
    for i, w in enumerate(weight.numpy()):
        for m in range(2):
            for j in range(4):
                if p[i, m, j] > 0:
                    expected[m] += w * p[i, m, j] * math.log(p[i, m, j] / q[i, m, j])
    got = consistency_loss(torch.tensor(p), scores, weight)
    np.testing.assert_allclose(got, expected, rtol=RTOL)


def test_equal_posteriors_diverge_by_nothing():
    scores, weight = example()
    zero = consistency_loss(posterior(scores), scores, weight)
    np.testing.assert_allclose(zero, np.zeros(2), atol=1e-12)


IDEAL = [
    (2, 0.6220, 0.881), (3, 0.6013, 0.807), (4, 0.5848, 0.770), (5, 0.5702, 0.753),
    (10, 0.5079, 0.757), (20, 0.4088, 0.838), (50, 0.2386, 0.963), (100, 0.1306, 0.996),
]  # fmt: skip


@pytest.mark.parametrize(("k", "loss", "confidence"), IDEAL)
def test_an_ideal_balanced_partition_has_the_loss_of_its_closed_form(k, loss, confidence):
    """The scores are indicators: standardised, sqrt(K-1) and -1/sqrt(K-1)."""
    weight = torch.ones(3 * k).double()
    indicators = torch.eye(k).double().repeat(3, 1)
    normalized = normalize(indicators, weight, epsilon=0.0)
    own, other = math.sqrt(k - 1), -1 / math.sqrt(k - 1)
    p_own = math.exp(own) / (math.exp(own) + (k - 1) * math.exp(other))
    closed = -p_own * math.log(expit(own / GAMMA)) - (1 - p_own) * math.log(expit(other / GAMMA))
    p = posterior(normalized)
    got = em_loss(p, normalized, weight, GAMMA).item() / (3 * k)
    assert got == pytest.approx(closed, rel=RTOL)
    assert got == pytest.approx(loss, abs=1e-4)
    assert p.amax(dim=1).mean().item() == pytest.approx(confidence, abs=1e-3)


# --- Table 1 ---


def trained(X, k, normalized=True, seed=0, n_steps=400):
    """Scores of a perceptron that has been trained on X by Eq. 6, with or without Sec. 5."""
    objective = MixtureEM(NeuralMixtureNetwork(X.shape[1], k).init_weights(generator(seed)))
    if not normalized:
        objective.normalize = lambda scores, weight: scores
    rows = Rows(X.astype(np.float32), torch.device("cpu"), torch.float32)
    n_epochs = n_steps // len(rows.batch_sizes(128, even=True))
    minimize(objective, rows, batch_size=128, max_iter=n_epochs, generator=generator(seed))
    with torch.no_grad():
        return objective.network.scores(rows.take(torch.arange(128)))[:, 0]


def test_with_normalisation_all_densities_have_one_integral_and_without_one_takes_all():
    X, _ = make_blobs(1280, centers=5, cluster_std=0.5, random_state=0)
    X = (X - X.mean(axis=0)) / X.std(axis=0)
    scores = trained(X, 5)
    h = log_density(normalize(scores, torch.ones(128)), GAMMA).exp().mean(dim=0)
    assert (h - 0.5).abs().max() < 0.005
    scores = trained(X, 5, normalized=False)
    assert len(scores.argmax(dim=1).unique()) == 1
    assert log_density(scores, GAMMA).exp().mean(dim=0).amax() > 0.9


# --- Phases ---


def images(n=40, side=6, channels=1, seed=0):
    return torch.rand(n, channels * side * side, generator=generator(seed)).double()


def image_network(**options):
    arguments = {"image_shape": (1, 6, 6), "network": "C3 M F5", **options}
    return NeuralMixtureNetwork(36, 3, **arguments).init_weights(generator()).double()


def test_eq_7_adds_the_loss_of_the_views_under_the_posteriors_of_the_rows():
    network, x = image_network(n_members=2), images()
    weight = torch.arange(1.0, 41.0).double()
    objective = MixtureEM(network, view=lambda batch: batch.flip(3) ** 2)
    terms = objective.em_step(network.prepare(x), None, weight)
    with torch.no_grad():
        rows = network.prepare(x)
        first = normalize(network.scores(rows), weight)
        second = normalize(network.scores(rows.flip(3) ** 2), weight)
        p = posterior(first)
        expected = {
            "em": em_loss(p, first, weight, GAMMA),
            "em_view": em_loss(p, second, weight, GAMMA),
            "confidence": weight @ p.amax(dim=2),
        }
    assert set(terms) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].detach(), value, rtol=1e-6, atol=1e-8)


def test_posteriors_are_constants_of_a_step():
    """The gradient is that of the loss with p frozen."""
    network, x, weight = image_network(), images(), torch.ones(40).double()
    objective = MixtureEM(network)
    objective.em_step(network.prepare(x), None, weight)["em"].sum().backward()
    ours = [p.grad.clone() for p in network.members.parameters()]
    network.zero_grad()
    normalized = normalize(network.scores(network.prepare(x)), weight)
    frozen = torch.tensor(posterior(normalized).detach().numpy())
    em_loss(frozen, normalized, weight, GAMMA).sum().backward()
    for a, b in zip(ours, network.members.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-10, atol=1e-14)


def test_the_second_phase_compares_the_views_of_the_first_with_new_posteriors():
    network, x, weight = image_network(), images(), torch.ones(40).double()
    views = iter([0.9, 0.5])
    objective = MixtureEM(network, lambda batch: batch * next(views), 1e-3)
    em, consistency = objective.phases()
    assert consistency.learning_rate == 1e-3
    em.step(network.prepare(x), None, weight)
    with torch.no_grad():
        for parameter in network.members.parameters():
            parameter.add_(0.1)  # the step of EM
    term = consistency.step(network.prepare(x), None, weight)["consistency"]
    with torch.no_grad():
        rows = network.prepare(x)
        p = posterior(normalize(network.scores(rows), weight))
        of_view = normalize(network.scores(0.9 * rows), weight)
    expected = consistency_loss(p, of_view, weight)
    torch.testing.assert_close(term.detach(), expected, rtol=1e-8, atol=1e-10)


def test_consistency_begins_after_the_warm_up():
    objective = MixtureEM(image_network(), lambda batch: 0.9 * batch, 1e-3, warm_up=2)
    rows = Rows(images().numpy(), torch.device("cpu"), torch.float64)
    history = minimize(objective, rows, max_iter=5, batch_size=20, generator=generator())
    assert len(history.terms["em"]) == 5
    assert len(history.terms["consistency"]) == 3


# --- Network ---


def test_statistics_are_those_of_all_rows_as_one_batch():
    network, x = image_network(n_members=2), images()
    weight = np.arange(40) % 3.0
    rows = Rows(x.numpy(), torch.device("cpu"), torch.float64, weight)
    network.fit_statistics(rows)
    with torch.no_grad():
        together = normalize(network.scores(network.prepare(x)), torch.tensor(weight))
        torch.testing.assert_close(network.normalized(x), together, rtol=1e-9, atol=1e-9)


def test_images_are_unfolded_made_gray_and_reduced_to_their_edges():
    network = NeuralMixtureNetwork(108, 3, image_shape=(3, 6, 6), network="C3 F5")
    assert network.input_shape == (2, 6, 6)
    prepared = network.prepare(torch.arange(216.0).view(2, 108))
    assert prepared.shape == (2, 3, 6, 6)
    assert prepared[1, 2, 0].tolist() == [180.0, 181.0, 182.0, 183.0, 184.0, 185.0]
    assert NeuralMixtureNetwork(108, 3, image_shape=(3, 6, 6), sobel=False).input_shape == (3, 6, 6)


def test_a_cluster_of_several_outputs_has_the_sum_of_their_posteriors():
    network = (
        NeuralMixtureNetwork(4, 2, n_members=2, n_outputs=5).init_weights(generator()).double()
    )
    x = torch.randn(7, 4, generator=generator()).double()
    membership = torch.zeros(2, 5, 2).double()
    groups = [[[0, 3], [1]], [[4], [0, 1, 2]]]  # outputs 2 and 4, and 3, are left out
    for m, clusters in enumerate(groups):
        for k, outputs in enumerate(clusters):
            membership[m, outputs, k] = 1.0
    network.membership = membership
    with torch.no_grad():
        e = network.normalized(x).exp()
        sums = torch.zeros(7, 2, 2).double()
        for m, clusters in enumerate(groups):
            for k, outputs in enumerate(clusters):
                sums[:, m, k] = e[:, m, outputs].sum(dim=1)
        expected = (sums / sums.sum(dim=2, keepdim=True)).mean(dim=1)
        torch.testing.assert_close(network.resp(x), expected, rtol=RTOL, atol=RTOL)
        torch.testing.assert_close(
            network.relevance(x), sums.log().mean(dim=1), rtol=RTOL, atol=RTOL
        )


def test_contingencies_are_counts_of_rows():
    network, x = image_network(n_members=2), images()
    weight = 1.0 + np.arange(40) % 3
    rows = Rows(x.numpy(), torch.device("cpu"), torch.float64, weight)
    with torch.no_grad():
        labels = network.fit_statistics(rows).member_resp(x).argmax(dim=2).numpy()
    expected = np.zeros((2, 3, 2, 3))
    for row, w in zip(labels, weight):
        for m in range(2):
            for n in range(2):
                expected[m, row[m], n, row[n]] += w
    np.testing.assert_allclose(contingencies(network, rows), expected)


# --- Vectors ---


def clumps(shares=(0.6, 0.25, 0.1, 0.05), n=1000, seed=0):
    """Blobs that touch nowhere, of unequal size."""
    counts = np.round(np.array(shares) * n).astype(int)
    corners = 8 * np.array([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]])[: len(counts)]
    return make_blobs(counts, centers=corners, cluster_std=1.0, random_state=seed)


def test_it_finds_moons_that_kmeans_cuts():
    X, y = make_moons(600, noise=0.05, random_state=0)
    model = NeuralMixtureEM(2, weights="learned", n_init=5, max_iter=100, random_state=0).fit(X)
    assert adjusted_rand_score(y, model.labels_) > 0.95
    assert adjusted_rand_score(y, KMeans(2, n_init=3, random_state=0).fit_predict(X)) < 0.6


def test_units_and_offsets_of_features_change_nothing(overlapping):
    X, _ = overlapping
    fits = [NeuralMixtureEM(4, max_iter=30, dtype="auto", random_state=0) for _ in range(2)]
    first = fits[0].fit(X)
    moved = fits[1].fit(X * [1.0, 1e3, 1e-3, 7.0] + [5.0, -3.0, 0.0, 1.0])
    np.testing.assert_allclose(
        first.transform(X[:9]),
        moved.transform(X[:9] * [1.0, 1e3, 1e-3, 7.0] + [5.0, -3.0, 0.0, 1.0]),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("batch_size", [32, 128])
def test_one_row_predicts_as_many_do_in_any_order(batch_size, overlapping):
    X = overlapping[0].astype(np.float32)
    model = NeuralMixtureEM(4, batch_size=batch_size, max_iter=10, random_state=0).fit(X)
    p = model.predict_proba(X)
    order = np.argsort(model.labels_)  # sorted by class: statistics of such batches would mislead
    np.testing.assert_allclose(model.predict_proba(X[order]), p[order], rtol=0, atol=1e-6)
    for i in range(0, 300, 37):
        np.testing.assert_allclose(model.predict_proba(X[i : i + 1])[0], p[i], rtol=0, atol=1e-6)


def test_max_iter_auto_makes_a_thousand_steps_and_ten_epochs():
    assert NeuralMixtureEM(2, n_init=1, random_state=0).fit(clumps()[0]).n_iter_ == 125
    small = Rows(np.zeros((150, 2)), torch.device("cpu"), torch.float32)
    large = Rows(np.zeros((70_000, 2)), torch.device("cpu"), torch.float32)
    assert NeuralMixtureEM()._n_epochs(small) == 1000
    assert NeuralMixtureEM()._n_epochs(large) == 10


def test_the_score_is_minus_eq_6_on_the_training_data(overlapping):
    X, _ = overlapping
    model = NeuralMixtureEM(4, dtype="auto", n_init=2, max_iter=20, random_state=0).fit(X)
    normalized = torch.tensor(model.transform(X))
    loss = em_loss(posterior(normalized), normalized, torch.ones(300).double(), GAMMA).item()
    assert model.score(X) == pytest.approx(-loss / 300, rel=1e-9)
    np.testing.assert_allclose(posterior(normalized), model.predict_proba(X), rtol=1e-9)
    assert model.score_samples(X).max() <= 0


def test_the_centres_are_the_weighted_means_of_the_clusters(blobs):
    X, _ = blobs
    weight = np.arange(240) % 3.0
    model = NeuralMixtureEM(4, max_iter=100, n_init=2, random_state=0).fit(X, sample_weight=weight)
    for k in range(4):
        rows = model.labels_ == k
        expected = np.average(X[rows], axis=0, weights=weight[rows])
        np.testing.assert_allclose(model.cluster_centers_[k], expected, rtol=1e-5)


def test_balanced_blobs_reach_the_ideal_loss_and_confidence(blobs):
    X, y = blobs
    model = NeuralMixtureEM(4, random_state=0).fit(X)
    assert adjusted_rand_score(y, model.labels_) == 1.0
    assert -model.score(X) == pytest.approx(0.5848, abs=5e-3)
    assert model.history_["confidence"][-1] == pytest.approx(0.770, abs=1e-2)


@pytest.mark.parametrize("augmentation", ["noise", "masking", "mixup"])
def test_vectors_have_views_too(augmentation, blobs):
    X, y = blobs
    options = {"augmentation": augmentation, "two_fold": True, "random_state": 0}
    model = NeuralMixtureEM(4, n_init=2, max_iter=300, **options).fit(X)
    assert adjusted_rand_score(y, model.labels_) > 0.95
    assert {"em", "em_view", "confidence", "consistency"} <= set(model.history_)
    assert np.allclose(model.history_["loss"], model.history_["em"] + model.history_["em_view"])


def test_a_views_function_is_called_with_standardised_rows(blobs):
    seen = []

    def view(rows):
        seen.append(rows)
        return rows

    model = NeuralMixtureEM(4, augmentation=view, max_iter=1, n_init=1, random_state=0).fit(
        blobs[0]
    )
    assert torch.cat(seen[1:]).std(dim=0, correction=0).numpy() == pytest.approx(
        np.ones(3), rel=1e-4
    )
    np.testing.assert_allclose(model.history_["em"], model.history_["em_view"], rtol=1e-5)


# --- Restarts ---


def test_the_most_stable_restart_is_kept_or_that_of_lowest_loss():
    X = load_digits().data[:600]
    options = {"n_init": 6, "max_iter": 20, "random_state": 1, "dtype": "auto"}
    by_loss = NeuralMixtureEM(10, selection="loss", **options).fit(X)
    stable = NeuralMixtureEM(10, **options).fit(X)
    assert by_loss.score(X) > stable.score(X)
    # The criteria themselves, on the network that holds all six:
    kept = []

    class Watched(NeuralMixtureEM):
        def _criterion(self, fit, network):
            kept.append((network, contingencies(network, fit.rows)))
            return super()._criterion(fit, network)

    Watched(10, **options).fit(X)
    network, table = kept[0]
    with torch.no_grad():
        scores = network.em_scores(torch.tensor(X)).mean(dim=0).numpy()
    assert by_loss.score(X) == pytest.approx(scores.max(), rel=1e-6)
    assert stable.score(X) == pytest.approx(scores[np.argmax(stability(table))], rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"n_init": 1}, {"weights": "learned"}, {"ensemble": True}])
def test_a_fit_that_diverges_is_refused(options, blobs):
    model = NeuralMixtureEM(4, max_iter=1, learning_rate_init=1e30, random_state=0, **options)
    with pytest.raises(FloatingPointError, match="Lower learning_rate_init"):
        model.fit(blobs[0])


def test_restarts_that_collapse_alike_are_not_the_most_stable():
    table = np.zeros((4, 2, 4, 2))
    labels = [[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    for r, first in enumerate(labels):
        for t, second in enumerate(labels):
            for a, b in zip(first, second):
                table[r, a, t, b] += 1
    assert np.argmax(stability(table)) < 2


def test_a_callback_sees_one_restart_of_an_ensemble(blobs):
    X, _ = blobs
    seen = []

    class Watched(NeuralMixtureEM):
        def _attributes(self, fit, trained):
            seen.append(self._attributes_midway(fit, trained.network))
            return super()._attributes(fit, trained)

    model = Watched(4, ensemble=True, n_init=3, max_iter=100, random_state=0).fit(X)
    assert model.module_.n_members == 3
    for name, value in seen[0].items():
        setattr(model, name, value)
    assert model.module_.n_members == 1
    assert model.predict_proba(X).max(axis=1).mean() > 0.6


def test_a_constant_feature_is_harmless_whatever_the_weights(blobs):
    X, y = blobs
    X = np.c_[X, np.full(len(X), 0.1)]
    weight = 0.1 + np.random.default_rng(0).random(len(X))
    options = {"n_init": 2, "max_iter": 200, "random_state": 0}
    model = NeuralMixtureEM(4, **options).fit(X, sample_weight=weight)
    assert adjusted_rand_score(y, model.labels_) == 1.0
    np.testing.assert_array_equal(model.labels_, model.predict(X.astype(np.float32)))


def test_an_ensemble_is_the_mean_of_its_members_under_one_naming(overlapping):
    X, _ = overlapping
    options = {"n_init": 5, "max_iter": 60, "random_state": 0}
    model = NeuralMixtureEM(4, ensemble=True, **options).fit(X)
    network = model.module_.double()
    with torch.no_grad():
        members = network.member_resp(torch.tensor(X)).numpy()
    assert members.shape == (300, 5, 4)
    np.testing.assert_allclose(model.predict_proba(X), members.mean(axis=1), atol=1e-6)
    labels = members.argmax(axis=2)
    agreement = [np.mean(labels[:, m] == model.labels_) for m in range(5)]
    assert min(agreement) > 0.6
    assert model.set_params(warm_start=True).fit(X).module_.n_members == 5


def test_restarts_train_as_they_would_alone():
    """Side by side or one by one: the same start gives the same end."""
    X, _ = clumps(n=300)
    rows = Rows(X, torch.device("cpu"), torch.float64)
    together = NeuralMixtureNetwork(2, 4, n_members=3).init_weights(generator()).double()
    alone = together.select(1)
    for network in (together, alone):
        minimize(MixtureEM(network), rows, batch_size=100, max_iter=20, generator=generator(5))
        network.fit_statistics(rows)
    x = torch.tensor(X)
    with torch.no_grad():
        torch.testing.assert_close(
            together.normalized(x)[:, 1], alone.normalized(x)[:, 0], rtol=1e-7, atol=1e-9
        )


# --- Unequal clusters ---


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]


@pytest.mark.parametrize("shares", [(0.6, 0.25, 0.1, 0.05), (0.8, 0.2)])
@pytest.mark.parametrize("seed", SEEDS)
def test_learned_weights_find_unequal_clumps_that_equal_shares_cut(shares, seed):
    X, y = clumps(shares, seed=seed)
    k = len(shares)
    options = {"n_init": 5, "max_iter": 80, "random_state": seed}
    equal = NeuralMixtureEM(k, **options).fit(X)
    learned = NeuralMixtureEM(k, weights="learned", **options).fit(X)
    assert clustering_accuracy(y, equal.labels_) < 0.75
    assert clustering_accuracy(y, learned.labels_) > 0.99
    np.testing.assert_allclose(sorted(learned.weights_, reverse=True), shares, atol=0.01)
    np.testing.assert_allclose(equal.weights_, np.full(k, 1 / k))
    assert learned.transform(X).shape == (len(X), k)
    logits = torch.tensor(learned.transform(X))
    np.testing.assert_allclose(posterior(logits), learned.predict_proba(X), atol=1e-6)


def test_learned_weights_of_equal_clumps_are_equal(blobs):
    X, y = blobs
    model = NeuralMixtureEM(4, weights="learned", n_init=5, max_iter=300, random_state=0).fit(X)
    assert adjusted_rand_score(y, model.labels_) == 1.0
    np.testing.assert_array_equal(model.weights_, np.full(4, 0.25))
    assert model.module_.n_outputs == 4


def test_given_weights_of_a_cluster_without_rows_are_finite():
    class OneCluster:
        def member_resp(self, batch):
            return torch.tensor([[[1.0, 0.0]]]).expand(len(batch), 1, 2)

        def renumber(self, membership):
            self.membership = membership

    network = OneCluster()
    impose_weights(network, rows_of(np.zeros((4, 2)), torch.float32), np.array([0.3, 0.7]))
    np.testing.assert_allclose(network.membership[0, 0], [0.0, 0.7])  # the larger, the larger
    assert np.all(np.isfinite(network.membership))


def test_given_weights_name_clusters_by_size_and_weigh_posteriors():
    X, _ = clumps()
    given = [0.1, 0.6, 0.05, 0.25]
    model = NeuralMixtureEM(4, weights=given, n_init=5, max_iter=80, random_state=0).fit(X)
    shares = np.bincount(model.labels_, minlength=4) / len(X)
    np.testing.assert_allclose(shares, given, atol=0.01)
    np.testing.assert_array_equal(model.weights_, given)


def test_the_prior_of_the_general_equation():
    """Sec. 6: posteriors times new over old weights, normalised."""
    network = NeuralMixtureNetwork(2, 3).init_weights(generator()).double()
    x = torch.randn(9, 2, generator=generator()).double()
    weight = torch.arange(1.0, 10.0).double()
    rows = Rows(x.numpy(), torch.device("cpu"), torch.float64, weight.numpy())
    with torch.no_grad():
        before = network.resp(x)
        found = weight @ before / weight.sum()
        given = np.array([0.1, 0.7, 0.2])
        impose_weights(network, rows, given)
        # The largest cluster gets the largest weight and its number, and so on.
        order = np.argsort(found.numpy())[[0, 2, 1]]
        expected = before[:, order] / found[order] * torch.tensor(given)
        expected = expected / expected.sum(dim=1, keepdim=True)
        torch.testing.assert_close(network.resp(x), expected, rtol=RTOL, atol=RTOL)


def test_an_ensemble_of_unequal_clusters():
    X, y = clumps()
    options = {"n_init": 5, "max_iter": 60, "random_state": 0}
    model = NeuralMixtureEM(4, weights="learned", ensemble=True, **options).fit(X)
    assert clustering_accuracy(y, model.labels_) > 0.99
    assert model.module_.n_outputs == 40
    assert model.module_.n_members == 5


def test_an_ensemble_of_given_weights_keeps_its_members_matched(blobs):
    X, y = blobs
    options = {"n_init": 5, "max_iter": 200, "random_state": 0}
    model = NeuralMixtureEM(4, weights=[0.25] * 4, ensemble=True, **options).fit(X)
    assert adjusted_rand_score(y, model.labels_) == 1.0
    members = model.module_.double().member_resp(torch.tensor(X)).argmax(dim=2)
    assert (members == members[:, :1]).all()


@pytest.mark.parametrize("weights", ["learned", [0.4, 0.3, 0.2, 0.1]])
def test_training_that_goes_on_keeps_its_weights(weights):
    X, _ = clumps()
    options = {"n_init": 2, "max_iter": 20, "random_state": 0, "warm_start": True}
    model = NeuralMixtureEM(4, weights=weights, **options).fit(X)
    n_outputs = model.module_.n_outputs
    assert model.fit(X).module_.n_outputs == n_outputs
    with pytest.raises(
        ValueError, match=r"goes on with a model of weights=.*got weights='uniform'"
    ):
        model.set_params(weights="uniform").fit(X)


def test_convolutional_networks_have_pieces_too(digits):
    X, _ = digits
    model = NeuralMixtureEM(4, weights=[0.4, 0.3, 0.2, 0.1], max_iter=3, **IMAGES).fit(X)
    assert model.module_.n_outputs == 40
    assert model.predict_proba(X).shape == (len(X), 4)


def test_few_rows_get_few_pieces():
    assert n_pieces(4, 2000) == 40
    assert n_pieces(20, 2000) == 100
    assert n_pieces(4, 60) == 12
    assert n_pieces(4, 10) == 8


# --- Images ---


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    chosen = data.target < 4
    return data.data[chosen].astype(np.uint8), data.target[chosen]


IMAGES = {"image_shape": (1, 8, 8), "network": "C8 M C16 F16", "n_init": 1, "random_state": 0}


def test_images_are_clustered_end_to_end(digits):
    X, y = digits
    model = NeuralMixtureEM(4, max_iter=60, learning_rate_init=2e-3, **IMAGES).fit(X)
    assert clustering_accuracy(y, model.labels_) > 0.9
    assert model.history_["confidence"][-1] > 0.7


def test_bytes_are_scaled_as_floats_are(digits):
    X, _ = digits
    model = NeuralMixtureEM(4, max_iter=2, **IMAGES)
    first = model.fit(X).predict_proba(X)
    second = model.fit(X.astype(np.float32)).predict_proba(X.astype(np.float32))
    third = (
        model.set_params(scale=False)
        .fit(X.astype(np.float32) / 16)
        .predict_proba(X.astype(np.float32) / 16)
    )
    np.testing.assert_allclose(first, second, atol=1e-6)
    np.testing.assert_allclose(first, third, atol=1e-4)


def test_views_come_from_the_generator_of_the_fit(digits, global_random_states):
    X, _ = digits
    before = global_random_states()
    fits = [
        NeuralMixtureEM(4, two_fold=True, max_iter=2, **{**IMAGES, "random_state": seed}).fit(X)
        for seed in (0, 0, 1)
    ]
    assert global_random_states() == before
    first, again, other = (model.predict_proba(X) for model in fits)
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_restarts_of_convolutional_networks_train_side_by_side(digits):
    X, _ = digits
    options = {**IMAGES, "n_init": 3, "max_iter": 2}
    model = NeuralMixtureEM(4, ensemble=True, **options).fit(X)
    assert len(model.module_.members) == 3


def test_of_convolutional_networks_the_one_of_lowest_loss_goes_on_after_a_race(digits):
    X, _ = digits
    losses = []

    class Watched(NeuralMixtureEM):
        def _stage(self, fit, network, *args, **options):
            n_members = network.n_members
            history = super()._stage(fit, network, *args, **options)
            last = sum(history.terms[name][-1] for name in history.watch)
            losses.append((n_members, history.n_iter, last))
            return history

    options = {**IMAGES, "n_init": 3, "max_iter": 10, "two_fold": True, "consistency_warm_up": 4}
    model = Watched(4, **options).fit(X)
    (n_race, race_epochs, raced), (n_kept, kept_epochs, kept) = losses
    assert (n_race, race_epochs, n_kept, kept_epochs) == (3, 3, 1, 7)
    assert model.n_iter_ == len(model.history_["em"]) == 10
    assert len(model.history_["consistency"]) == 6
    assert model.history_["loss"][2] == pytest.approx(raced.min(), rel=1e-6)
    assert model.history_["loss"][-1] == pytest.approx(kept.item(), rel=1e-6)


def test_an_interruption_of_the_race_leaves_a_fitted_estimator(digits, monkeypatch, press_ctrl_c):
    X, _ = digits

    def press(self, state):
        press_ctrl_c()

    monkeypatch.setattr("deepmix.callbacks.Progress.__call__", press)
    model = NeuralMixtureEM(4, max_iter=10, verbose=1, **{**IMAGES, "n_init": 3})
    with pytest.warns(ConvergenceWarning, match=r"interrupted after 1 of 3 epochs \(race\)"):
        model.fit(X)
    assert model.n_iter_ == 1
    np.testing.assert_array_equal(model.predict(X), model.labels_)


@pytest.mark.parametrize("sobel", [True, False])
def test_colour_images(sobel):
    X = np.random.default_rng(0).random((60, 3 * 8 * 8)).astype(np.float32)
    model = NeuralMixtureEM(
        3, image_shape=(3, 8, 8), network="C4 M F8", sobel=sobel, max_iter=2, random_state=0
    ).fit(X)
    first = next(iter(model.module_.members[0]))
    assert first.in_channels == (2 if sobel else 3)


def test_a_network_by_callable_and_by_module(digits):
    X, _ = digits

    def build(shape, n_out):
        return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), n_out))

    options = {**IMAGES, "max_iter": 2}
    model = NeuralMixtureEM(4, **{**options, "network": build}).fit(X)
    assert model.transform(X).shape == (len(X), 4)
    module = nn.Sequential(nn.Flatten(), nn.Linear(2 * 8 * 8, 4))
    before = [p.detach().clone() for p in module.parameters()]
    NeuralMixtureEM(4, **{**options, "network": module}).fit(X)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before))


def test_views_by_callable(digits):
    X, _ = digits
    shapes = []

    def turn(batch):
        shapes.append(tuple(batch.shape))
        return batch.flip(3)

    NeuralMixtureEM(4, augmentation=turn, max_iter=1, **IMAGES).fit(X)
    assert shapes.pop(0) == (2, 1, 8, 8)  # a trial before training
    assert sum(shape[0] for shape in shapes) == len(X)
    assert {shape[1:] for shape in shapes} == {(1, 8, 8)}


def test_bfloat16_trains_much_alike(digits):
    X, _ = digits
    options = {"max_iter": 5, **IMAGES}
    models = [NeuralMixtureEM(4, precision=p, **options).fit(X) for p in ("float32", "bfloat16")]
    losses = [model.history_["loss"][-1] for model in models]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0] != losses[1]


def test_a_loss_of_confidence_is_warned_of(digits):
    X, _ = digits
    rates = {"learning_rate_init": 3e-4, "consistency_learning_rate": 1e-2}
    options = {"two_fold": True, "consistency_warm_up": 8, "augmentation": "strong", "max_iter": 20}
    model = NeuralMixtureEM(4, **options, **rates, **IMAGES)
    with pytest.warns(ConvergenceWarning, match=r"Confidence.*has fallen.*Lower consistency_learn"):
        model.fit(X)


# --- The paper's settings ---


def test_the_papers_settings_are_those_of_sec_8():
    vectors = NeuralMixtureEM.from_paper("mnist_2d").get_params()
    assert vectors["learning_rate_init"] == "auto"
    assert (vectors["max_iter"], vectors["batch_size"], vectors["gamma"]) == (10, 128, 5.0)
    assert (vectors["hidden_layer_sizes"], vectors["weight_decay"]) == ((32, 32), 0.0)
    stl10 = NeuralMixtureEM.from_paper("stl10", two_fold=False).get_params()
    assert (stl10["network"], stl10["image_shape"], stl10["max_iter"]) == (
        "stl10",
        (3, 96, 96),
        250,
    )
    assert (stl10["learning_rate_init"], stl10["consistency_learning_rate"]) == (5e-5, 1e-4)
    assert not stl10["two_fold"]
    assert NeuralMixtureEM.from_paper("cifar100").n_clusters == 20
    with pytest.raises(ValueError, match=r"no experiment on 'svhn'.*mnist_2d"):
        NeuralMixtureEM.from_paper("svhn")


# --- Errors ---

MODULE = nn.Linear(64, 4)
ROWS = np.random.default_rng(0).random((40, 64))
BAD = [
    ({"image_shape": (8, 8)}, r"image_shape must be \(channels, height, width\).*got \(8, 8\)"),
    ({"image_shape": (2, 8, 4)}, "with 1 or 3 channels"),
    ({"image_shape": (1, 8, 0)}, "image_shape must be"),
    ({"image_shape": (1, 7, 7)}, r"makes rows of 49 pixels; X has 64 features"),
    ({"network": "mnist"}, "one for images; got image_shape=None"),
    ({"image_shape": (1, 8, 8), "network": "C3 X"}, "cannot be read at 'X'"),
    (
        {"image_shape": (1, 8, 8), "network": lambda s, k: nn.Linear(8, k)},
        "network must map a batch",
    ),
    ({"network": nn.Linear(64, 4), "n_init": 2}, "restarts of one torch.nn.Module"),
    ({"network": nn.Linear(64, 4), "weights": "learned"}, "more outputs than clusters"),
    ({"augmentation": "weak"}, "augmentation='weak' is none for vectors"),
    ({"augmentation": ImageAugmentation(rotation=3)}, "is none for vectors"),
    ({"image_shape": (1, 8, 8), "augmentation": "noise"}, "'noise' is none for images"),
    ({"two_fold": True}, "makes none. Name an augmentation"),
    ({"hidden_layer_sizes": (8, 0)}, "hidden_layer_sizes must hold integers >= 1"),
    ({"precision": "bfloat16", "dtype": "float64"}, "'bfloat16' goes with dtype='float32'"),
    ({"network": lambda _, k: nn.Identity()}, "network has no parameter to train"),
    ({"network": lambda _, k: MODULE, "n_init": 2}, "and 2 restarts of it would be one model"),
    ({"augmentation": lambda x: x[:1]}, r"must map a tensor of shape \(2, 64\).*it gave \(1, 64\)"),
    ({"augmentation": lambda x: x.numpy()}, "it gave ndarray"),
    (
        {"two_fold": True, "augmentation": "noise", "consistency_warm_up": 5, "max_iter": 5},
        "consistency_warm_up=5 leaves none of max_iter=5",
    ),
    ({"weights": [0.5, 0.5]}, "weights must hold n_clusters=4 positive shares"),
    ({"weights": [0.5, 0.5, 0.0, 0.0]}, "weights must hold n_clusters=4 positive shares"),
    ({"weights": [1.0, 1.0, 1.0, 1.0]}, "weights must sum to 1; got a sum of 4"),
]


@pytest.mark.parametrize(("parameters", "message"), BAD)
def test_what_does_not_go_together_is_refused_before_training(parameters, message, monkeypatch):
    monkeypatch.setattr("deepmix.base.minimize", lambda *a, **k: pytest.fail("it trained"))
    with pytest.raises(ValueError, match=message):
        NeuralMixtureEM(4, random_state=0, **parameters).fit(ROWS)


def test_pixels_outside_of_zero_and_one_need_scaling(monkeypatch):
    monkeypatch.setattr("deepmix.base.minimize", lambda *a, **k: pytest.fail("it trained"))
    with pytest.raises(
        ValueError, match=r"pixels must lie from 0 to 1; got .* to 2\d\d.*scale=True"
    ):
        NeuralMixtureEM(4, scale=False, **IMAGES).fit(255 * ROWS)
