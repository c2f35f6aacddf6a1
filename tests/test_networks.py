"""Networks: initial weights, clustering head, scaling, and what a user hands in."""

import numpy as np
import pytest
import torch
from torch import nn

from deepmix.mixture.clustering_module.network import ClusteringNetwork
from deepmix.networks import (
    CONVOLUTIONS,
    MLP,
    ConvNet,
    Members,
    StackedMLP,
    Standardizer,
    Whitener,
    build_on_meta,
    check_shapes,
    init_bias,
    init_weights,
    is_meta,
    make_coder,
    materialize,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_clustering(n_restarts=3, n_clusters=4, d=5, seed=0):
    network = ClusteringNetwork(d, n_clusters, n_restarts).double()
    for parameter in network.parameters():
        parameter.data.normal_(generator=generator(seed))
    return network


# --- Initial weights ---


def test_kernels_are_glorot_uniform_and_biases_zero():
    layer = init_weights(MLP((300, 200)), generator())[0]
    bound = (6 / 500) ** 0.5
    assert layer.weight.abs().max() <= bound
    assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert torch.equal(layer.bias, torch.zeros(200))


def test_the_scheme_fan_in_is_how_pytorch_starts_its_layers():
    for layer in (nn.Linear(60, 500), nn.Conv2d(7, 90, 3)):
        first = [p.clone() for p in layer.parameters()]
        init_weights(layer, generator(), "fan-in")
        bound = layer.weight[0].numel() ** -0.5
        for ours, theirs in zip(layer.parameters(), first, strict=True):
            assert not torch.equal(ours, theirs)
            assert ours.abs().max() <= bound
            assert theirs.abs().max() <= bound
            assert ours.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
            assert theirs.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_glorot_biases_have_the_authors_deviation_and_cut():
    bias = init_bias(torch.empty(50_000), generator()) * 50_000**0.5
    assert bias.std().item() == pytest.approx(1.0, rel=0.02)
    assert bias.abs().max().item() <= 2 / 0.8796 * 1.001


def test_weights_come_from_the_generator_alone(global_random_states):
    before = global_random_states()
    first = materialize(build_on_meta(lambda: MLP((4, 3, 2))), generator(0))
    second = materialize(build_on_meta(lambda: MLP((4, 3, 2))), generator(0))
    assert global_random_states() == before
    for a, b in zip(first.parameters(), second.parameters()):
        assert torch.equal(a, b)


def test_an_mlp_has_leaky_layers_and_a_linear_end():
    kinds = [type(layer) for layer in MLP((4, 3, 3, 2))]
    assert kinds == [nn.Linear, nn.LeakyReLU] * 2 + [nn.Linear]
    assert [layer.negative_slope for layer in MLP((4, 3, 2)) if hasattr(layer, "negative_slope")]
    assert [type(layer) for layer in MLP((4, 2))] == [nn.Linear]


# --- Clustering head ---


def test_responsibilities_sum_to_one_for_every_restart():
    resp = random_clustering().log_resp(torch.rand(7, 5).double()).exp()
    assert resp.shape == (7, 3, 4)
    torch.testing.assert_close(resp.sum(dim=2), torch.ones(7, 3).double())


def test_a_selected_restart_is_that_restart():
    network, x = random_clustering(), torch.rand(7, 5).double()
    for restart in range(3):
        one = network.select(restart)
        torch.testing.assert_close(one.log_resp(x)[:, 0], network.log_resp(x)[:, restart])
        torch.testing.assert_close(one.centers()[0], network.centers()[restart])


def test_centres_are_the_decoders_images_of_the_unit_vectors():
    network = random_clustering(n_restarts=1)
    units = torch.eye(4).double()
    images = units @ network.decoder_weight[0] + network.decoder_bias[0]
    torch.testing.assert_close(network.centers()[0], images)


@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_posterior_logits_assign_each_row_to_its_nearest_centre(temperature):
    centers = torch.randn(2, 4, 5, generator=generator()).double()
    x = torch.randn(200, 5, generator=generator(1)).double()
    network = ClusteringNetwork(5, 4, 2).double().init_centers(centers, temperature)
    for restart in range(2):
        log_resp = network.log_resp(x)[:, restart]
        distances = torch.cdist(x, centers[restart]).square()
        torch.testing.assert_close(log_resp, (-temperature * distances).log_softmax(dim=1))
        assert torch.equal(log_resp.argmax(dim=1), distances.argmin(dim=1))
    assert torch.equal(network.centers(), centers)


def test_the_pseudo_inverse_gives_one_hot_logits_at_the_centres():
    centers = torch.randn(2, 3, 5, generator=generator()).double()
    network = ClusteringNetwork(5, 3, 2).double().init_pseudo_inverse(centers)
    for restart in range(2):
        resp = network.log_resp(centers[restart])[:, restart]
        expected = torch.eye(3).double().log_softmax(dim=1)
        torch.testing.assert_close(resp, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("k", "p"), [(4, 4), (3, 7)])
def test_orthonormal_centres_are_orthonormal(k, p):
    network = ClusteringNetwork(p, k).double().init_orthonormal(generator(), gain=3.0)
    centers = network.centers()[0]
    torch.testing.assert_close(centers @ centers.T, torch.eye(k).double(), atol=1e-10, rtol=0)
    torch.testing.assert_close(network.encoder_weight, 3 * centers.T)


def test_a_random_start_differs_between_restarts_and_scales_its_logits():
    plain = ClusteringNetwork(5, 4, 2).init_random(generator())
    strong = ClusteringNetwork(5, 4, 2).init_random(generator(), gain=10.0)
    first, second = plain.centers()
    assert not torch.allclose(first, second)
    torch.testing.assert_close(strong.encoder_weight, 10 * plain.encoder_weight)
    torch.testing.assert_close(strong.centers(), plain.centers())


# --- Networks side by side, convolutions ---


def test_stacked_perceptrons_are_perceptrons_one_by_one():
    stack = StackedMLP((4, 6, 5, 3), 7).double().init_weights(generator())
    x = torch.randn(9, 4, generator=generator(1)).double()
    together = stack(x)
    assert together.shape == (9, 7, 3)
    for m in range(7):
        out = x
        for i, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True)):
            out = out @ weight[m] + bias[m, 0]
            out = out if i == 2 else out.relu()
        torch.testing.assert_close(together[:, m], out, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(stack.select(m)(x)[:, 0], out, rtol=1e-12, atol=1e-12)


def test_a_member_chosen_from_a_stack_shares_no_memory_that_training_changes():
    stack = StackedMLP((2, 3), 2).init_weights(generator())
    chosen = stack.select(1)
    before = chosen.weights[0].clone()
    stack.weights[0].data.zero_()
    assert torch.equal(chosen.weights[0], before)


def test_stacked_perceptrons_start_as_pytorchs_layers_do():
    stack = StackedMLP((64, 500), 3).init_weights(generator())
    assert stack.weights[0].abs().max() <= 1 / 8
    assert stack.weights[0].std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.02)
    assert not torch.equal(stack.weights[0][0], stack.weights[0][1])


def test_members_are_called_one_by_one():
    members = Members([nn.Linear(3, 2) for _ in range(4)])
    x = torch.randn(5, 3, generator=generator())
    assert members(x).shape == (5, 4, 2)
    torch.testing.assert_close(members.select(2)(x)[:, 0], members[2](x))


@pytest.mark.parametrize(
    ("name", "image_shape", "count"),
    [
        ("mnist", (2, 28, 28), 772_010),
        ("cifar", (2, 32, 32), 1_308_682),
        ("stl10", (2, 96, 96), 2_693_642),
    ],
)
def test_the_papers_networks_have_the_papers_number_of_parameters(name, image_shape, count):
    network = build_on_meta(lambda: ConvNet(name, image_shape, 10))
    assert sum(p.numel() for p in network.parameters()) == count
    assert name in CONVOLUTIONS


def test_a_line_of_text_is_a_network():
    network = ConvNet("C4 M C8 F5 F6", (1, 6, 9), 3)
    kinds = [type(layer).__name__ for layer in network]
    conv, dense = ["Conv2d", "ReLU"], ["Linear", "ReLU"]
    assert kinds == [*conv, "MaxPool2d", *conv, "Flatten", *dense, *dense, "Linear"]
    assert network[6].in_features == 8 * 3 * 4
    assert network(torch.zeros(2, 1, 6, 9)).shape == (2, 3)
    assert ConvNet("", (1, 2, 2), 3)(torch.zeros(5, 1, 2, 2)).shape == (5, 3)


@pytest.mark.parametrize(
    ("spec", "token"),
    [("C4 X3", "X3"), ("C4 M M M", "M"), ("F3 C4", "C4"), ("C", "C"), ("lenet", "lenet")],
)
def test_a_line_that_cannot_be_read_is_refused_at_its_word(spec, token):
    with pytest.raises(ValueError, match=f"cannot be read at '{token}'.*Use a name out of"):
        ConvNet(spec, (1, 5, 5), 3)


# --- Scaling ---


def test_standardised_data_have_unit_variance_on_average_and_come_back():
    x = torch.randn(100, 3, generator=generator()).double() * torch.tensor([1.0, 5.0, 20.0]) + 7
    scaler = Standardizer(3).double().fit(x.mean(dim=0), x.var(dim=0, correction=0))
    z = scaler(x)
    assert z.var(dim=0, correction=0).mean().item() == pytest.approx(1.0, rel=1e-6)
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(3).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(scaler.inverse(z), x)


def test_per_feature_each_feature_has_unit_variance_and_constants_keep_theirs():
    x = torch.randn(50, 3, generator=generator()).double() * torch.tensor([1.0, 9.0, 0.0]) + 3
    scaler = Standardizer(3, per_feature=True).double()
    z = scaler.fit(x.mean(dim=0), x.var(dim=0, correction=0))(x)
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(3).double(), rtol=0, atol=1e-12)
    expected = torch.tensor([1.0, 1.0, 0.0]).double()
    torch.testing.assert_close(z.var(dim=0, correction=0), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scaler.inverse(z), x, rtol=1e-12, atol=1e-12)


def test_limits_become_zero_and_one():
    scaler = Standardizer(2).fit_limits(-3.0, 5.0)
    assert scaler(torch.tensor([[-3.0, 5.0]])).tolist() == [[0.0, 1.0]]
    assert Standardizer(2).fit_limits(4.0, 4.0)(torch.full((1, 2), 4.0)).tolist() == [[0.0, 0.0]]


def test_constant_data_keep_their_scale():
    scaler = Standardizer(2).fit(torch.tensor([3.0, 4.0]), torch.zeros(2))
    assert scaler.scale == 1.0
    assert torch.equal(scaler(torch.tensor([[3.0, 4.0]])), torch.zeros(1, 2))


def test_a_whitener_is_the_identity_until_it_is_fitted_and_can_be_undone():
    z = torch.randn(10, 3, generator=generator()).double()
    whitener = Whitener(3).double()
    assert torch.equal(whitener(z), z)
    matrix = torch.randn(3, 3, generator=generator()).double()
    whitener.fit(z.mean(dim=0), matrix)
    torch.testing.assert_close(whitener(z), (z - z.mean(dim=0)) @ matrix)
    torch.testing.assert_close(whitener.inverse(whitener(z)), z)


# --- What a user hands in ---


def test_no_spec_is_an_mlp_of_the_sizes_without_memory():
    coder = make_coder(None, (4, 3, 2), "encoder")
    assert is_meta(coder)
    assert coder(torch.empty(5, 4, device="meta")).shape == (5, 2)


def test_a_module_is_copied_with_its_weights():
    module = nn.Linear(4, 2)
    coder = make_coder(module, (4, 2), "encoder")
    assert coder is not module
    assert torch.equal(coder.weight, module.weight)
    assert coder.weight.data_ptr() != module.weight.data_ptr()


def test_a_callable_is_called_with_both_widths_and_draws_no_global_number(global_random_states):
    calls = []

    def build(n_in, n_out):
        calls.append((n_in, n_out))
        return nn.Linear(n_in, n_out)

    before = global_random_states()
    coder = make_coder(build, (4, 9, 2), "encoder")
    assert calls == [(4, 2)]
    assert is_meta(coder)
    assert global_random_states() == before


def test_a_callable_that_returns_no_module_is_refused():
    with pytest.raises(TypeError, match=r"encoder must return a torch.nn.Module.*\(4, 2\); got"):
        make_coder(lambda n_in, n_out: n_in, (4, 2), "encoder")


def test_buffers_of_a_callables_network_are_refused_with_the_remedy():
    class WithBuffer(nn.Linear):
        def __init__(self, n_in, n_out):
            super().__init__(n_in, n_out)
            self.register_buffer("table", torch.arange(3.0))

    coder = make_coder(WithBuffer, (4, 2), "encoder")
    with pytest.raises(ValueError, match=r"registers buffers.*pass an nn.Module instance"):
        materialize(coder, generator())


def test_normalisation_layers_of_a_callables_network_start_at_their_constants():
    def build(n_in, n_out):
        return nn.Sequential(nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.LayerNorm(n_out))

    _, batch_norm, layer_norm = materialize(make_coder(build, (4, 2), "encoder"), generator())
    for layer in (batch_norm, layer_norm):
        assert torch.equal(layer.weight, torch.ones(2))
        assert torch.equal(layer.bias, torch.zeros(2))
    assert torch.equal(batch_norm.running_var, torch.ones(2))
    assert torch.equal(batch_norm.running_mean, torch.zeros(2))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match=r"must map a batch of shape \(2, 4\) to \(2, 3\).*\(2, 2\)"
    ):
        check_shapes(nn.Linear(4, 2), 4, 3, "encoder")
    with pytest.raises(ValueError, match=r"decoder cannot be applied to a batch of shape \(2, 5\)"):
        check_shapes(nn.Linear(4, 2), 5, 2, "decoder")


@pytest.mark.parametrize("mode", [True, False])
def test_checking_shapes_changes_neither_mode_nor_statistics(mode):
    module = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).train(mode)
    check_shapes(module, 4, 2, "encoder")
    assert module.training is mode
    assert np.all(module[1].running_mean.numpy() == 0)
