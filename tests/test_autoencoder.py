"""Autoencoders: building, pretraining, the unit of their error."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import nn

from deepmix import pretrain_autoencoder
from deepmix._torch import Rows
from deepmix.autoencoder import (
    Autoencoder,
    build_autoencoder,
    draw_autoencoder,
    reconstruction_unit,
)
from deepmix.networks import Standardizer


def test_an_autoencoder_is_decoder_after_encoder():
    encoder, decoder, x = nn.Linear(4, 2), nn.Linear(2, 4), torch.rand(3, 4)
    assert torch.equal(Autoencoder(encoder, decoder)(x), decoder(encoder(x)))


def pretrain(X, **options):
    options = {"hidden_layer_sizes": (8,), "latent_dim": 2, "max_iter": 20, **options}
    return pretrain_autoencoder(X, random_state=0, learning_rate_init=1e-2, **options)


def error(autoencoder, X):
    x = torch.tensor(X, dtype=torch.float32)
    with torch.inference_mode():
        return float((autoencoder(x) - x).square().mean())


def test_pretraining_lowers_the_reconstruction_error(blobs):
    X = blobs[0] / 10
    assert error(pretrain(X), X) < 0.5 * error(pretrain(X, max_iter=0), X)


def test_a_pretrained_autoencoder_is_on_the_cpu_in_float32_in_eval_mode(blobs):
    autoencoder = pretrain(blobs[0], max_iter=1)
    assert not autoencoder.training
    assert {p.dtype for p in autoencoder.parameters()} == {torch.float32}
    assert {p.device.type for p in autoencoder.parameters()} == {"cpu"}


def test_pretraining_repeats_and_touches_no_global_state(blobs, global_random_states):
    before = global_random_states()
    first, second = pretrain(blobs[0], max_iter=2), pretrain(blobs[0], max_iter=2)
    assert global_random_states() == before
    for a, b in zip(first.parameters(), second.parameters()):
        assert torch.equal(a, b)


def test_sparse_rows_pretrain_as_dense_ones(blobs):
    dense, sparse = (pretrain(X, max_iter=2) for X in (blobs[0], sp.csr_array(blobs[0])))
    for a, b in zip(dense.parameters(), sparse.parameters()):
        assert torch.equal(a, b)


def test_weights_of_rows_count_in_pretraining(blobs):
    X = blobs[0]
    weight = np.r_[np.ones(120), np.zeros(120)]
    options = {"max_iter": 3, "batch_size": 1000}
    weighted = pretrain(X, sample_weight=weight, **options)
    half = pretrain(X[:120], **options)
    for a, b in zip(weighted.parameters(), half.parameters()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("weight", "message"),
    [([1.0, 2.0], "inconsistent numbers"), (np.full(240, -1.0), "Negative values")],
)
def test_weights_that_cannot_be_are_refused_before_pretraining(weight, message, blobs):
    with pytest.raises(ValueError, match=message):
        pretrain(blobs[0], sample_weight=weight)


def test_parts_that_a_user_gives_are_copied():
    encoder = nn.Linear(4, 2)
    autoencoder = build_autoencoder(4, 2, (3,), encoder=encoder)
    draw_autoencoder(autoencoder, 4, 2, torch.Generator())
    assert torch.equal(autoencoder.encoder.weight, encoder.weight)
    assert autoencoder.encoder is not encoder
    assert autoencoder.decoder(torch.rand(5, 2)).shape == (5, 4)


def test_parts_that_do_not_fit_are_refused():
    autoencoder = build_autoencoder(4, 2, (3,), decoder=nn.Linear(2, 3))
    with pytest.raises(ValueError, match="decoder must map a batch"):
        draw_autoencoder(autoencoder, 4, 2, torch.Generator())


@pytest.mark.parametrize(
    ("name", "value"),
    [("latent_dim", 0), ("batch_size", -1), ("hidden_layer_sizes", ("a",)), ("latent_dim", 2.5)],
)
def test_sizes_that_no_network_has_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be made of integers >= 1; got"):
        pretrain_autoencoder(np.eye(4), **{name: value})


def test_the_unit_of_reconstruction_is_the_error_of_a_row(blobs):
    X, _ = blobs
    rows = Rows(X, torch.device("cpu"), torch.float64)
    scaler, coder = Standardizer(X.shape[1]).double(), torch.nn.Module()
    scaler.fit(*rows.moments())
    coder.forward = lambda x: 0.5 * x
    network = torch.nn.Module()
    network.scaler, network.autoencoder = scaler, coder
    scaled = (X - X.mean(axis=0)) / float(scaler.scale)
    expected = 0.25 * (scaled**2).sum(axis=1).mean()
    assert reconstruction_unit(network, rows, 0.01) == pytest.approx(expected, rel=1e-9)
    # A copy has no error, and counts as one of a share of the variance.
    coder.forward = lambda x: x
    assert reconstruction_unit(network, rows, 0.01) == pytest.approx(0.04 * expected, rel=1e-9)
