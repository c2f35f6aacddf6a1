"""Random streams with named children, and what an estimator must have."""

import numpy as np
import pytest
import torch
from torch import nn

from deepmix._torch import Rows
from deepmix.base import REQUIRED, BaseDeepMixture
from deepmix.fitting import Fit, RandomStreams


def draws(streams):
    return streams.numpy.randint(2**31), int(torch.randint(2**31, (), generator=streams.torch))


def test_a_child_hangs_on_its_name_and_on_nothing_that_was_drawn():
    streams = RandomStreams(0)
    before = draws(streams.child("read-out"))
    draws(streams)
    assert draws(streams.child("read-out")) == before
    assert draws(RandomStreams(0).child("read-out")) == before
    others = {draws(streams.child("start")), draws(RandomStreams(1).child("read-out"))}
    assert len(others | {before}) == 3


def test_no_stream_is_seeded_twice():
    streams = RandomStreams(0)
    found = [draws(s) for s in (streams, streams.child("read-out"), streams.next())]
    assert len(set(found)) == 3


def test_streams_of_a_generator_go_on_where_it_is():
    state = np.random.RandomState(3)
    first, second = draws(RandomStreams(state)), draws(RandomStreams(state))
    assert first != second
    assert first == draws(RandomStreams(3))


def test_a_fit_is_not_changed_by_the_network_that_its_rows_go_through():
    class Wide(nn.Module):
        width = 10**6

    rows = Rows(np.zeros((5, 2)), torch.device("cpu"), torch.float32)
    fit = Fit(rows, None, RandomStreams(0))
    assert fit.through(Wide()).rows.inference_batch_size < fit.rows.inference_batch_size
    assert (fit.device.type, fit.dtype, rows.width) == ("cpu", torch.float32, 2)


@pytest.mark.parametrize("name", REQUIRED)
def test_an_estimator_without_a_hook_is_refused_when_it_is_made(name):
    written = {other: object() for other in REQUIRED if other != name}
    with pytest.raises(TypeError, match=rf"Mine is an estimator without {name}: .*abstract=True"):
        type("Mine", (BaseDeepMixture,), written)
    base = type("Base", (BaseDeepMixture,), written, abstract=True)
    whole = type("Mine", (base,), {name: object()})
    assert hasattr(whole, name)
