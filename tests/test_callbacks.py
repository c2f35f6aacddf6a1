"""Callbacks of the loop: stopping, progress, checkpoints."""

import numpy as np
import pytest
import torch

from deepmix.callbacks import Checkpoint, EarlyStopping, EpochState, Progress


def feed(callback, losses, max_iter=100):
    """Epochs told to a callback until it stops; returns how many."""
    for epoch, loss in enumerate(losses):
        if callback(EpochState("fit", epoch, max_iter, {"loss": np.asarray(loss)})):
            return epoch + 1
    return None


def test_the_loss_of_an_epoch_is_the_sum_of_its_terms():
    state = EpochState("fit", 0, 1, {"a": np.array([1.0, 2.0]), "b": np.array([3.0, 4.0])})
    np.testing.assert_array_equal(state.loss, [4.0, 6.0])


def test_early_stopping_counts_epochs_without_improvement():
    stop = EarlyStopping(tol=0.1, n_iter_no_change=3)
    # 9.5 is no improvement on 10 by a tenth; 8 is, and begins the count anew.
    assert feed(stop, [10, 9.5, 9.4, 8, 7.9, 7.8, 7.7, 1]) == 7
    assert stop.converged


def test_early_stopping_goes_on_while_there_is_improvement():
    stop = EarlyStopping(tol=1e-3, n_iter_no_change=2)
    assert feed(stop, 0.9 ** np.arange(50)) is None
    assert not stop.converged


def test_early_stopping_measures_negative_losses_by_their_size():
    stop = EarlyStopping(tol=0.1, n_iter_no_change=2)
    assert feed(stop, [-1, -1.05, -1.08, -5]) == 3
    assert feed(EarlyStopping(tol=0.1, n_iter_no_change=2), [-1, -1.2, -1.5, -2]) is None


def test_early_stopping_waits_for_the_last_restart():
    stop = EarlyStopping(tol=0.1, n_iter_no_change=2)
    losses = [[1, 9], [1, 8], [1, 7], [1, 6], [1, 6], [1, 6]]
    assert feed(stop, losses) == 6


def test_progress_prints_every_nth_epoch_and_the_last(capsys):
    progress = Progress("Model", every=10)
    assert feed(progress, np.arange(25.0), max_iter=25) is None
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["1/25", "11/25", "21/25", "25/25"]
    assert lines[1] == "[Model] fit 11/25  loss 10"


def test_a_checkpoint_restores_the_last_epoch_it_was_told_of():
    parameter = torch.nn.Parameter(torch.zeros(3))
    checkpoint = Checkpoint([parameter])
    with torch.no_grad():
        parameter.add_(1)
    checkpoint.save()
    with torch.no_grad():
        parameter.add_(1)
    checkpoint.restore()
    torch.testing.assert_close(parameter.data, torch.ones(3))


@pytest.mark.parametrize("loss", [np.float64(2.0), np.array([2.0, 3.0])])
def test_early_stopping_takes_one_loss_or_one_for_each_restart(loss):
    assert feed(EarlyStopping(1e-4, 2), [loss] * 5) == 3
