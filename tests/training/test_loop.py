"""`fit` and the hooks by themselves: which step is seen by whom, and in which order."""

from types import SimpleNamespace

import pytest
from fake_time import FakeTime

from dspo_jax.monitoring.clock import Clock
from dspo_jax.training.hooks import Log, Profile, Save, Speed
from dspo_jax.training.loop import AfterStep, fit
from dspo_jax.training.streams import TimedStream


class Numbers:
    """A stream of the numbers from 1 on."""

    def __init__(self):
        self.last = 0

    def next(self, params):
        del params
        self.last += 1
        return self.last

    def get_state(self):
        return str(self.last)

    def set_state(self, state):
        self.last = int(state)

    def close(self):
        pass


def test_the_clock_sees_the_host_wait_for_a_stream_of_any_kind():
    now = FakeTime()
    clock = Clock(now=now)

    class Slow(Numbers):
        def next(self, params):
            now.seconds += 3
            return super().next(params)

    stream = TimedStream(Slow(), clock)
    clock.tick(0)
    assert stream.next(None) == 1
    now.seconds += 1
    clock.tick(8)
    clock.lap()
    assert clock.data_wait == 0.75
    stream.set_state(stream.get_state() + "0")
    assert stream.next(None) == 11


class Watch:
    """A hook that is due at some steps, and notes what happens in a list that all share."""

    def __init__(self, name, log, steps):
        self.name, self.log, self.steps = name, log, steps

    def due(self, at):
        return at.step in self.steps or at.last

    def __call__(self, at, state, metrics):
        self.log.append((self.name, at.step, state.step, dict(metrics)))


def start(step=0):
    return SimpleNamespace(step=step, params=None, arrays=dict, health=SimpleNamespace(skipped_in_a_row=0))


def count(state, batch):
    """The step after `state`; its metric says which batch it was given."""
    return start(state.step + 1), {"batch": batch}


def test_hooks_are_called_in_order_with_the_step_just_made():
    log = []
    hooks = [Watch("first", log, {2}), Watch("second", log, {2, 3})]
    assert fit(count, start(), Numbers(), steps=5, hooks=hooks).step == 5
    assert log == [
        ("first", 2, 2, {"batch": 2}),
        ("second", 2, 2, {"batch": 2}),
        ("second", 3, 3, {"batch": 3}),
        ("first", 5, 5, {"batch": 5}),
        ("second", 5, 5, {"batch": 5}),
    ]


def test_a_run_that_begins_is_seen_before_its_first_step_and_a_resumed_one_is_not():
    begun, resumed = [], []
    fit(count, start(), Numbers(), steps=1, hooks=[Watch("x", begun, {0})])
    fit(count, start(3), Numbers(), steps=4, hooks=[Watch("x", resumed, {0, 3})])
    assert [step for _, step, *_ in begun] == [0, 1]
    assert [step for _, step, *_ in resumed] == [4]


def test_a_request_to_stop_makes_the_step_under_way_the_last():
    log, asked = [], iter([False, False, True])
    state = fit(count, start(), Numbers(), steps=9, hooks=[Watch("x", log, ())], stopping=lambda: next(asked))
    assert state.step == 3
    assert log == [("x", 3, 3, {"batch": 3})]


def test_nothing_is_done_behind_the_last_step():
    stream = Numbers()
    assert fit(count, start(4), stream, steps=4, hooks=[Watch("x", [], {4})]).step == 4
    assert stream.last == 0


class Deferred:
    """A metric that the device computes; `ready` are the steps that it has made."""

    def __init__(self, step, order):
        self.step, self.order = step, order

    def __float__(self):
        self.order.append(f"read {self.step}")
        return float(self.step)


@pytest.fixture
def logged():
    """Runs `fit` with a Log, and gives what was dispatched, read and saved, in order."""

    def run(steps, every, save_at=(), check=lambda step, values: None):
        order = []

        def update(state, batch):
            order.append(f"dispatch {batch}")
            return start(state.step + 1), {"loss": Deferred(batch, order)}

        save = Watch("save", [], save_at)
        save.log = SimpleNamespace(append=lambda event: order.append(f"save {event[1]}"))
        writer = SimpleNamespace(write=lambda step, values: order.append(f"write {step}"))
        progress = SimpleNamespace(update=lambda step, shown: None)
        log = Log(writer, progress, Speed(Clock(), 8, 0), every=every, before=[save], check=check)
        fit(update, start(), Numbers(), steps=steps, hooks=[log, save])
        return order

    return run


def test_metrics_are_read_only_after_the_next_step_was_dispatched(logged):
    assert logged(4, every=2) == [
        *("dispatch 1", "dispatch 2", "dispatch 3"),
        *("read 2", "write 2"),
        "dispatch 4",
        *("read 4", "write 4"),  # the last: nothing follows
        "save 4",
    ]


def test_metrics_are_written_before_the_state_is_saved(logged):
    assert logged(3, every=1, save_at={2}) == [
        *("dispatch 1", "dispatch 2"),
        *("read 1", "write 1", "read 2", "write 2", "save 2"),
        *("dispatch 3", "read 3", "write 3", "save 3"),
    ]


def test_the_first_step_which_compiled_has_no_speed():
    now = FakeTime()
    speed = Speed(Clock(now=now), 8, 0, flops_per_example=1e12, peak_flops=1e13)
    now.seconds += 60
    assert {k: v for k, v in speed.measure(1).items() if "memory" not in k} == {"examples_seen": 8}
    now.seconds += 4
    measured = speed.measure(2)
    assert measured["pairs_per_second"] == measured["tflops_per_device"] == 2
    assert (measured["mfu"], measured["data_wait"], measured["examples_seen"]) == (0.2, 0, 16)


def test_the_speed_of_images_is_not_called_one_of_pairs():
    now, shown, written = FakeTime(), [], []
    log = Log(
        SimpleNamespace(write=lambda step, values: written.append(values)),
        SimpleNamespace(update=lambda step, values: shown.append(values)),
        Speed(Clock(now=now), 8, 0, "images"),
        every=1,
    )
    for step in (1, 2, 3):
        now.seconds += 4
        log(AfterStep(step, step == 3), None, {"loss": 0.5})
    assert written[-1]["images_per_second"] == shown[-1]["images/s"] == 2
    assert not any("pairs" in name for values in (*written, *shown) for name in values)


def test_a_check_of_the_metrics_ends_the_run(logged):
    def check(step, values):
        if values["loss"] > 1:
            raise ArithmeticError(f"step {step}")

    with pytest.raises(ArithmeticError, match="step 2"):
        logged(9, every=1, check=check)


def test_a_better_score_is_saved_and_a_worse_one_is_not():
    scores, saved = {1: 0.3, 2: 0.5, 3: 0.25, 5: 0.75}, []  # the first is below the best of an earlier part
    checkpoints = SimpleNamespace(best=lambda: (0, 0.4), save=lambda *given: saved.append(given))
    validate = SimpleNamespace(scores=scores)
    save = Save(checkpoints, Numbers(), Clock(), every=4, validate=validate)
    fit(count, start(), Numbers(), steps=6, hooks=[save])
    assert [(step, score) for step, _, _, score in saved] == [(2, 0.5), (4, None), (5, 0.75), (6, None)]
    assert all(extra.keys() == {"data", "clock"} for _, _, extra, _ in saved)


def test_the_profiler_is_told_of_each_further_step():
    told = []
    profiler = SimpleNamespace(before=lambda step, state: told.append((step, state.step)))
    fit(count, start(), Numbers(), steps=3, hooks=[Profile(profiler)])
    assert told == [(1, 0), (2, 1), (3, 2)]
    assert not Profile(profiler).due(AfterStep(3, last=True))
