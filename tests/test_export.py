"""Modules leave the package: `torch.export` and ONNX, for any number of rows."""

import warnings

import numpy as np
import pytest
import torch

from deepmix import (
    AECM,
    DCAN,
    AutoencoderDeepDPM,
    ClusteringModule,
    DeepDPM,
    NeuralMixtureEM,
)

ESTIMATORS = {
    "ClusteringModule": (ClusteringModule, {}),
    "AECM": (AECM, {}),
    "NeuralMixtureEM": (NeuralMixtureEM, {}),
    "DeepDPM": (DeepDPM, {"max_iter": 5}),
    "DeepDPM, EM": (DeepDPM, {"amortized": False, "max_iter": 5}),
    "DeepDPM, EM, diag": (DeepDPM, {"amortized": False, "covariance_type": "diag", "max_iter": 5}),
    "DeepDPM, normalised": (DeepDPM, {"amortized": False, "scaling": "normalize", "max_iter": 5}),
    "AutoencoderDeepDPM": (AutoencoderDeepDPM, {"max_iter": 2}),
    "AutoencoderDeepDPM, net": (AutoencoderDeepDPM, {"amortized": True, "clustering_max_iter": 5}),
    **{
        f"DCAN, {kind}": (DCAN, {"covariance_type": kind, "max_iter": 2, "pretrain_max_iter": 2})
        for kind in ("full", "tied", "diag", "spherical", "tied_spherical", "tracked")
    },
}


@pytest.fixture(params=ESTIMATORS)
def fitted(request, blobs, small):
    """A fitted model, its module, its rows and its responsibilities of 50 of them."""
    cls, parameters = ESTIMATORS[request.param]
    X = blobs[0].astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # so short a training leaves clusters empty
        model = small(cls, **parameters).fit(X)
    return model, X[:50], model.predict_proba(X[:50])


def any_number_of_rows():
    return {"x": {0: torch.export.Dim("rows", min=1, max=2**20)}}


@pytest.mark.parametrize("n_rows", [1, 3, 50])
def test_a_module_is_exported_for_any_number_of_rows(fitted, n_rows):
    model, X, expected = fitted
    program = torch.export.export(
        model.to_module(), (torch.tensor(X[:7]),), dynamic_shapes=any_number_of_rows()
    )
    with torch.inference_mode():
        got = program.module()(torch.tensor(X[:n_rows]))
    np.testing.assert_allclose(got, expected[:n_rows], atol=1e-5)
