"""Modules leave the package: `torch.export` and ONNX, for any number of rows."""

import numpy as np
import pytest
import torch
from common import MAY_BE_EMPTY, SMALL
from torch.export import Dim

from deepmix import DCAN, AutoencoderDeepDPM, DeepDPM

pytestmark = MAY_BE_EMPTY
EM = {"amortized": False}
ESTIMATORS = {
    **{cls.__name__: (cls, {}) for cls in SMALL},
    "DeepDPM, EM": (DeepDPM, EM),
    "DeepDPM, EM, diag": (DeepDPM, {**EM, "covariance_type": "diag"}),
    "DeepDPM, EM, normalize": (DeepDPM, {**EM, "scaling": "normalize"}),
    "AutoencoderDeepDPM, amortized": (AutoencoderDeepDPM, {"amortized": True}),
    **{
        f"DCAN, {kind}": (DCAN, {"covariance_type": kind})
        for kind in ("full", "tied", "diag", "spherical", "tied_spherical", "tracked")
    },
}


@pytest.fixture(params=ESTIMATORS)
def fitted(request, blobs, small):
    """A fitted model, 50 rows, and their responsibilities."""
    cls, parameters = ESTIMATORS[request.param]
    X = blobs[0].astype(np.float32)
    model = small(cls, **parameters).fit(X)
    return model, X[:50], model.predict_proba(X[:50])


def exported(function, model, X, **options):
    """An export from seven rows that leaves their number open."""
    rows = {0: Dim("rows", min=1, max=2**20)}
    return function(
        model.to_module(), (torch.tensor(X[:7]),), dynamic_shapes={"x": rows}, **options
    )


def test_a_module_is_exported_for_any_number_of_rows(fitted):
    model, X, expected = fitted
    module = exported(torch.export.export, model, X).module()
    for n_rows in (1, 3, 50):
        with torch.inference_mode():
            got = module(torch.tensor(X[:n_rows]))
        np.testing.assert_allclose(got, expected[:n_rows], atol=1e-5)


@pytest.mark.slow
# torch 2.13 copies the trees of an exported program by a class that it has deprecated itself.
@pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")
def test_a_module_in_onnx_gives_what_the_estimator_gives(fitted):
    pytest.importorskip("onnxscript", reason="exports to ONNX")
    runtime = pytest.importorskip("onnxruntime", reason="runs ONNX")
    model, X, expected = fitted
    program = exported(torch.onnx.export, model, X, dynamo=True, verbose=False)
    session = runtime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (given,) = session.get_inputs()
    for n_rows in (1, 3, 50):
        (got,) = session.run(None, {given.name: X[:n_rows]})
        np.testing.assert_allclose(got, expected[:n_rows], atol=1e-5)
