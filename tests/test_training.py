"""The one training loop: phases, hooks, closed forms, stopping, errors, interruption."""

import numpy as np
import pytest
import torch

from deepmix._torch import Rows, full_precision
from deepmix.callbacks import EarlyStopping, Interruption
from deepmix.training import Averaged, History, Objective, Phase, minimize, optimizer_to_numpy

N, D = 40, 3


def data(seed=0, weight=None):
    X = np.random.default_rng(seed).normal(size=(N, D)) + 1.0
    return Rows(X, torch.device("cpu"), torch.float64, weight)


def parameter(*shape, value=0.0):
    return torch.nn.Parameter(torch.full(shape, value, dtype=torch.float64))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Mean(Objective):
    """Weighted squared distance to one point, whose minimum is the mean of the rows."""

    def __init__(self, closed_form=False, **phase):
        self.centre = parameter(D)
        self.closed_form, self.options = closed_form, phase
        self.seen = []

    def phases(self):
        step = self.by_hand if self.closed_form else self.step
        return (Phase((self.centre,), step, closed_form=self.closed_form, **self.options),)

    def step(self, batch, index, weight):
        self.seen.append(index)
        return {"distance": weight @ (batch - self.centre).square().sum(dim=1)}

    def by_hand(self, batch, index, weight):
        return self.step(batch, index, weight), (-2 * weight @ (batch - self.centre),)


def train(objective, rows=None, **options):
    options = {"learning_rate": 0.05, "batch_size": 10, "max_iter": 5, **options}
    options.setdefault("generator", generator())
    return minimize(objective, data() if rows is None else rows, **options)


# --- One phase ---


def test_the_minimum_of_squared_distances_is_the_weighted_mean():
    weight = np.arange(N) % 4.0
    rows = data(weight=weight)
    objective = Mean()
    train(objective, rows, batch_size=N, max_iter=400)
    torch.testing.assert_close(objective.centre.data, rows.moments()[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", ["adam", "sgd"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_closed_form_gradients_train_as_autograd_does(solver, max_grad_norm):
    options = {"solver": solver, "learning_rate": 1e-2, "max_grad_norm": max_grad_norm}
    by_hand, by_autograd = Mean(closed_form=True), Mean()
    histories = [train(o, **options) for o in (by_hand, by_autograd)]
    torch.testing.assert_close(by_hand.centre, by_autograd.centre, rtol=1e-12, atol=0)
    first, second = (h.arrays()["loss"] for h in histories)
    np.testing.assert_allclose(first, second, rtol=1e-12)


def test_one_step_of_gradient_descent_is_the_formula():
    rows, objective = data(), Mean()
    minimize(objective, rows, learning_rate=1e-3, batch_size=N, max_iter=1, solver="sgd")
    expected = 1e-3 * 2 * rows.take(torch.arange(N)).sum(dim=0)
    torch.testing.assert_close(objective.centre.data, expected)


def test_momentum_is_that_of_gradient_descent_and_the_first_decay_of_adam():
    def centre(solver, **options):
        objective = Mean()
        options |= {"learning_rate": 1e-3, "batch_size": N, "max_iter": 2, "solver": solver}
        minimize(objective, data(), **options)
        return objective.centre.detach()

    total = data().take(torch.arange(N)).sum(dim=0)
    first = 1e-3 * 2 * total
    second = first + 1e-3 * (2 * total - 2 * N * first)
    torch.testing.assert_close(centre("sgd"), second)
    torch.testing.assert_close(centre("sgd", momentum=0.5), second + 0.5 * first)
    torch.testing.assert_close(centre("adam"), centre("adam", momentum=0.9), rtol=0, atol=0)
    assert torch.any(centre("adam") != centre("adam", momentum=0.5))


def test_clipping_bounds_the_step():
    objective = Mean()
    options = {"solver": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.25}
    train(objective, batch_size=N, max_iter=1, **options)
    assert objective.centre.detach().norm() == pytest.approx(0.25, rel=1e-5)


def test_history_is_the_mean_of_each_term_per_unit_of_weight():
    weight = np.arange(N) % 4.0
    objective = Mean()
    history = train(objective, data(weight=weight), batch_size=N, max_iter=1)
    X = data().take(torch.arange(N)).numpy()
    expected = np.average(np.square(X).sum(axis=1), weights=weight)
    assert history.terms["distance"][0] == pytest.approx(expected, rel=1e-12)


def test_history_decreases_and_counts_epochs():
    history = train(Mean(), max_iter=7)
    assert history.n_iter == 7
    curves = history.arrays()
    assert set(curves) == {"loss", "distance"}
    assert np.all(np.diff(curves["loss"]) < 0)


def test_the_same_generator_gives_the_same_bits_and_another_does_not():
    def centre(seed):
        objective = Mean()
        train(objective, generator=generator(seed))
        return objective.centre.detach().numpy()

    np.testing.assert_array_equal(centre(0), centre(0))
    assert not np.array_equal(centre(0), centre(1))


def test_one_batch_of_all_rows_keeps_their_order():
    objective = Mean()
    train(objective, batch_size=N, max_iter=2)
    for index in objective.seen:
        assert torch.equal(index, torch.arange(N))


def test_rows_of_weight_zero_are_never_visited():
    weight = np.arange(N) % 3.0
    objective = Mean()
    train(objective, data(weight=weight), max_iter=2)
    assert set(torch.cat(objective.seen).tolist()) == set(np.flatnonzero(weight).tolist())


def test_a_phase_may_have_its_own_learning_rate():
    slow, fast = Mean(learning_rate=1e-4), Mean()
    for objective in (slow, fast):
        train(objective, solver="sgd", learning_rate=1e-3, batch_size=N, max_iter=1)
    torch.testing.assert_close(10 * slow.centre, fast.centre)


def test_no_epochs_change_nothing():
    objective = Mean()
    history = train(objective, max_iter=0)
    assert history.n_iter == 0
    assert history.arrays() == {}
    assert torch.equal(objective.centre.data, torch.zeros(D, dtype=torch.float64))


# --- Restarts side by side ---


class Restarts(Objective):
    """Two points that train together, their losses apart."""

    def __init__(self):
        self.centres = torch.nn.Parameter(torch.tensor([[0.0], [5.0]], dtype=torch.float64))

    def phases(self):
        return (Phase((self.centres,), self.step),)

    def step(self, batch, index, weight):
        squared = (batch[:, None, :1] - self.centres).square().sum(dim=2)
        return {"distance": weight @ squared, "shared": (0 * self.centres).sum() + 1.0}


def test_restarts_have_histories_of_their_own():
    history = train(Restarts(), max_iter=3)
    near, far = history.arrays(0), history.arrays(1)
    assert near["distance"].shape == far["distance"].shape == (3,)
    assert np.all(near["distance"] < far["distance"])
    # A term that is no sum over restarts counts for each of them.
    np.testing.assert_array_equal(near["shared"], far["shared"])
    np.testing.assert_allclose(near["loss"], near["distance"] + near["shared"])


# --- Two phases ---


class Adversaries(Objective):
    """``min over a, max over b`` of ``(a - 1) b``, in two phases with an optimiser each."""

    def __init__(self):
        self.a, self.b = parameter(1), parameter(1, value=1.0)
        self.changes = []

    def phases(self):
        return (Phase((self.a,), self.lower), Phase((self.b,), self.raise_))

    def _value(self, batch):
        return ((self.a - 1) * self.b).sum() * len(batch) + self.b.square().sum()

    def lower(self, batch, index, weight):
        self.before = self.a.item(), self.b.item()
        return {"a": self._value(batch)}

    def raise_(self, batch, index, weight):
        after = self.a.item(), self.b.item()
        self.changes.append([x != y for x, y in zip(self.before, after)])
        self.seen_by_second = after
        return {"b": -self._value(batch)}


def test_two_phases_run_in_turn_and_each_changes_only_its_own_parameters():
    objective = Adversaries()
    history = train(objective, max_iter=3)
    # Between the phases of a batch a has moved and b has not; 4 batches an epoch.
    assert objective.changes == [[True, False]] * 12
    assert objective.b.item() != objective.seen_by_second[1]
    assert objective.a.item() == objective.seen_by_second[0]
    assert set(history.terms) == {"a", "b"}
    assert len(history.optimizers) == 2


def test_the_second_phase_leaves_no_gradient_in_the_parameters_of_the_first():
    class Recording(Adversaries):
        def raise_(self, batch, index, weight):
            self.gradient = self.a.grad.clone()
            return super().raise_(batch, index, weight)

    objective = Recording()
    train(objective, max_iter=1)
    assert torch.equal(objective.a.grad, objective.gradient)


def test_a_closed_form_and_a_differentiated_phase_go_together():
    class Both(Mean):
        def __init__(self):
            super().__init__(closed_form=True)
            self.other = Mean()

        def phases(self):
            (second,) = self.other.phases()
            renamed = second._replace(step=lambda *a: {"other": self.other.step(*a)["distance"]})
            return (*super().phases(), renamed)

    objective = Both()
    train(objective)
    torch.testing.assert_close(objective.centre, objective.other.centre, rtol=1e-12, atol=0)


# --- Epoch hooks ---


class Growing(Objective):
    """Centres whose number changes at the end of the first epoch; then they move again."""

    def __init__(self):
        self.centres = parameter(1, D)
        self.sizes, self.epochs = [], []

    def phases(self):
        return (Phase((self.centres,), self.step),)

    def step(self, batch, index, weight):
        self.sizes.append(len(self.centres))
        squared = (batch[:, None] - self.centres).square().sum(dim=2)
        return {"distance": weight @ squared.amin(dim=1)}

    def on_epoch_start(self, epoch):
        self.epochs.append(("start", epoch))

    def on_epoch_end(self, epoch):
        self.epochs.append(("end", epoch))
        if epoch != 0:
            return False
        centre = self.centres.data
        self.centres = torch.nn.Parameter(torch.cat([centre, centre + 1]))
        self.split = self.centres.detach().clone()
        return True


def test_parameters_that_change_shape_get_new_optimisers():
    objective = Growing()
    history = train(objective, max_iter=3)
    assert objective.sizes == [1] * 4 + [2] * 8
    assert torch.any(objective.centres != objective.split, dim=1).all()
    (optimizer,) = history.optimizers
    assert optimizer.param_groups[0]["params"][0] is objective.centres


def test_hooks_run_at_both_ends_of_every_epoch():
    objective = Growing()
    train(objective, max_iter=3)
    assert objective.epochs == [(side, e) for e in range(3) for side in ("start", "end")]


def test_updates_in_closed_form_belong_in_the_hook():
    class OneStep(Mean):
        def on_epoch_end(self, epoch):
            self.centre.data.copy_(rows.moments()[0])
            return False

    rows, objective = data(), OneStep()
    train(objective, rows, max_iter=1)
    torch.testing.assert_close(objective.centre.data, rows.moments()[0], rtol=0, atol=0)


def test_a_phase_without_parameters_is_an_e_step():
    class Sums(Objective):
        def phases(self):
            return (Phase((), self.step, closed_form=True),)

        def on_epoch_start(self, epoch):
            self.sum = 0.0

        def step(self, batch, index, weight):
            self.sum = self.sum + weight @ batch
            return {"rows": weight.sum()}, ()

    rows, objective = data(), Sums()
    history = train(objective, rows, max_iter=2)
    assert history.n_iter == 2
    assert history.optimizers == [None]
    np.testing.assert_array_equal(history.arrays()["rows"], [1.0, 1.0])
    mean = objective.sum / rows.total_weight
    torch.testing.assert_close(mean, rows.moments()[0], rtol=1e-10, atol=1e-12)


# --- The averaging epoch ---


@pytest.mark.parametrize("closed_form", [False, True])
def test_the_averaging_epoch_leaves_the_mean_of_its_iterates(closed_form):
    iterates = []

    class Recording(Mean):
        def step(self, batch, index, weight):
            iterates.append(self.centre.detach().clone())
            return super().step(batch, index, weight)

    objective, twin = Recording(closed_form), Mean(closed_form)
    train(Averaged(objective), max_iter=1)
    train(twin, max_iter=1)
    # A step begins at what the step before it has left; the twin ends where the last one ends.
    expected = torch.stack([*iterates[1:], twin.centre.detach()]).mean(dim=0)
    torch.testing.assert_close(objective.centre.data, expected, rtol=1e-12, atol=0)


def test_averaging_covers_every_phase_and_keeps_the_hooks():
    class Hooked(Adversaries):
        hooks = 0

        def on_epoch_start(self, epoch):
            self.hooks += 1

        def on_epoch_end(self, epoch):
            self.hooks += 1
            return False

    objective, twin = Hooked(), Adversaries()
    train(Averaged(objective), max_iter=1)
    train(twin, max_iter=1)
    assert objective.hooks == 2
    assert objective.a.item() != twin.a.item()
    assert objective.b.item() != twin.b.item()


# --- Stopping ---


def test_early_stopping_ends_the_stage_and_says_so():
    history = train(Mean(), max_iter=1000, callbacks=[EarlyStopping(1e-3, 3)])
    assert 3 < history.n_iter < 1000
    assert history.converged


def test_a_callback_ends_the_stage_after_the_others_are_told():
    told = []
    callbacks = [lambda s: s.epoch == 2, lambda s: told.append((s.task, s.epoch, s.max_iter))]
    history = train(Mean(), max_iter=10, callbacks=callbacks, task="stage")
    assert history.n_iter == 3
    assert not history.converged
    assert told == [("stage", epoch, 10) for epoch in range(3)]


# --- What goes wrong ---


class Failing(Mean):
    """The loss gets a bad value, or an interruption happens, in a given epoch."""

    def __init__(self, at, value=None):
        super().__init__()
        self.at, self.value, self.epoch, self.n_steps = at, value, 0, 0
        self.interruption = Interruption()
        self.ends = []

    def on_epoch_start(self, epoch):
        self.epoch = epoch

    def step(self, batch, index, weight):
        terms = super().step(batch, index, weight)
        if self.epoch == self.at:
            self.n_steps += 1
            if self.value is None and self.n_steps == 3:
                self.interruption.requested = True
            if self.value is not None:
                terms["bad"] = torch.tensor(self.value)  # leaves the gradient alone
        return terms

    def on_epoch_end(self, epoch):
        self.ends.append(self.centre.detach().clone())
        return False


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_names_term_epoch_stage_and_remedy(value):
    message = rf"'bad' became {value}.* in epoch 3 \(stage\).*Lower learning_rate_init"
    with pytest.raises(FloatingPointError, match=message):
        train(Failing(at=2, value=value), max_iter=10, task="stage")


def test_divergence_is_named_with_its_remedies():
    with pytest.raises(FloatingPointError, match=r"'distance'.*set max_grad_norm"):
        train(Mean(), solver="sgd", learning_rate=1e3, max_iter=100)


def test_an_interruption_within_an_epoch_leaves_the_last_whole_one():
    objective = Failing(at=2)
    options = {"max_iter": 10, "task": "stage", "interruption": objective.interruption}
    history = train(objective, **options)
    assert history.interrupted
    assert objective.interruption.place == "after 2 of 10 epochs (stage)"
    assert objective.n_steps == 3  # the step that it came in was the last
    assert history.n_iter == 2
    torch.testing.assert_close(objective.centre.data, objective.ends[-1], rtol=0, atol=0)


def test_an_interruption_in_the_first_epoch_leaves_the_start():
    objective = Failing(at=0)
    history = train(objective, interruption=objective.interruption)
    assert history.n_iter == 0
    assert torch.equal(objective.centre.data, torch.zeros(D, dtype=torch.float64))


def test_an_interruption_in_a_callback_keeps_the_epoch_that_it_ends():
    interruption = Interruption()

    def interrupt(state):
        interruption.requested = state.epoch == 1

    objective, twin = Mean(), Mean()
    history = train(objective, callbacks=[interrupt], interruption=interruption)
    train(twin, max_iter=2)
    assert history.n_iter == 2
    torch.testing.assert_close(objective.centre, twin.centre, rtol=0, atol=0)


# --- Going on ---


@pytest.mark.parametrize("stored", [False, True], ids=["live", "as arrays"])
@pytest.mark.parametrize("solver", ["adam", "sgd"])
def test_two_calls_with_the_optimisers_are_one(solver, stored):
    whole, parts = Mean(), Mean()
    options = {"solver": solver, "learning_rate": 0.01, "batch_size": N}
    train(whole, max_iter=6, **options)
    first = train(parts, max_iter=3, **options)
    resumed = [optimizer_to_numpy(o) for o in first.optimizers] if stored else first.optimizers
    train(parts, max_iter=3, optimizers=resumed, **options)
    torch.testing.assert_close(parts.centre, whole.centre, rtol=1e-12, atol=0)


def test_optimiser_state_is_a_copy():
    objective = Mean()
    history = train(objective, max_iter=1)
    (state,) = (optimizer_to_numpy(o) for o in history.optimizers)
    before = {name: value.copy() for name, value in state[0].items()}
    train(objective, max_iter=1, optimizers=history.optimizers)
    for name, value in before.items():
        np.testing.assert_array_equal(state[0][name], value)


def test_terms_of_stages_before_are_kept_apart_from_the_loss():
    history = train(Mean(), max_iter=2)
    history.before = {"pretrain_x": [np.array(1.0)] * 5}
    curves = history.arrays()
    assert curves["pretrain_x"].shape == (5,)
    np.testing.assert_array_equal(curves["loss"], curves["distance"])
    assert set(History(before=history.before).arrays()) == {"pretrain_x"}


# --- Precision ---


def test_bfloat16_runs_products_in_bfloat16_and_keeps_the_loss_in_float32():
    class Linear(Objective):
        def __init__(self):
            self.layer = torch.nn.Linear(D, 2)
            self.dtypes = set()

        def phases(self):
            return (Phase(tuple(self.layer.parameters()), self.step),)

        def step(self, batch, index, weight):
            out = self.layer(batch)
            self.dtypes.add(out.dtype)
            with full_precision(batch.device):
                squares = weight @ out.to(batch.dtype).square().sum(dim=1)
            assert squares.dtype == torch.float32
            return {"squares": squares}

    X = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
    rows = Rows(X, torch.device("cpu"), torch.float32)
    for precision, dtype in [("bfloat16", torch.bfloat16), ("float32", torch.float32)]:
        objective = Linear()
        history = train(objective, rows, precision=precision, max_iter=30)
        assert objective.dtypes == {dtype}
        assert all(p.dtype == torch.float32 for p in objective.layer.parameters())
        assert history.arrays()["loss"][-1] < history.arrays()["loss"][0]


# --- What is watched, what diverges ---


def test_early_stopping_watches_the_terms_that_the_objective_names():
    class Adversaries(Mean):
        watch = ("distance",)

        def step(self, batch, index, weight):
            return {**super().step(batch, index, weight), "noise": 0 * self.centre.sum() + 1e6}

    seen = []
    train(Adversaries(), max_iter=3, callbacks=[lambda state: seen.append(float(state.loss))])
    assert len(seen) == 3
    assert max(seen) < 1e6


def test_a_restart_that_diverges_leaves_the_others():
    class Two(Objective):
        parameter = torch.nn.Parameter(torch.tensor([1.0, float("nan")]))

        def phases(self):
            return (Phase((self.parameter,), self.step),)

        def step(self, batch, index, weight):
            return {"square": weight.sum() * self.parameter.square()}

    history = train(Two(), max_iter=2)
    curves = history.terms["square"]
    assert len(curves) == 2
    assert np.isfinite(curves[-1]).tolist() == [True, False]


def test_the_loss_sums_the_terms_that_are_watched():
    class Looked(Mean):
        watch = ("distance",)

        def step(self, batch, index, weight):
            terms = super().step(batch, index, weight)
            return {**terms, "rows": weight.sum()}  # no gradient, no loss

    plain, looked = Mean(), Looked()
    histories = [train(objective) for objective in (plain, looked)]
    assert torch.equal(plain.centre, looked.centre)
    curves = histories[1].arrays()
    np.testing.assert_array_equal(curves["loss"], histories[0].arrays()["loss"])
    np.testing.assert_allclose(curves["rows"], 1.0)


def test_weight_decay_adds_the_halved_squared_norm_to_the_loss_of_a_batch():
    class Decayed(Mean):
        def step(self, batch, index, weight):
            norm = self.centre.square().sum()
            return {**super().step(batch, index, weight), "norm": 0.5 * 7.0 * norm}

    by_option, by_hand = Mean(), Decayed()
    train(by_option, weight_decay=7.0)
    train(by_hand)
    torch.testing.assert_close(by_option.centre, by_hand.centre, rtol=1e-10, atol=0)


def test_even_batches_are_asked_for_by_the_objective():
    class Even(Mean):
        even_batches = True

    for objective, sizes in ((Mean(), [12, 12, 12, 4]), (Even(), [10, 10, 10, 10])):
        train(objective, batch_size=12, max_iter=1)
        assert [len(index) for index in objective.seen] == sizes
