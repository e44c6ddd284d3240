from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.step.messages import StepRecord
from ps.step.signals import NAMES as SIGNALS
from services.jobs.health import (
    FORGET_STEPS,
    LASTING_STEPS,
    MEASURED_STEPS,
    STALLED_STEPS,
    STRAGGLING_STEPS,
    Health,
)
from steepest.jobs import Finding

NAMES = ("first.weight", "first.bias", "last.weight")
SHAPES = ((10, 10), (10,), (10, 100))


def record(
    step: int,
    loss: float | None = None,
    norm: float = 1.0,
    norms: Iterable[float] = (),
    *,
    data: float = 0.0,
    skipped: bool = False,
    lr: float = 0.1,
    slowest: tuple[int, float] = (-1, 1.0),
    signals: Mapping[str, Iterable[float]] | None = None,
) -> StepRecord:
    falling = 1.0 / (1 + step)
    return StepRecord(
        step, float(step), falling if loss is None else loss, lr, 4.0, 4, norm, norm, 1.0, False, skipped, 1, 0.1, 0.1,
        0.0, 0.0, np.array(list(norms), "<f8").tobytes(), data, b"", *slowest, measured(signals),
    )  # fmt: skip


def measured(signals: Mapping[str, Iterable[float]] | None) -> bytes:
    """Those of three parameters; those that are not named are those of a healthy job."""
    if signals is None:
        return b""
    usual = {"update_norm": (1e-3, 1e-3, 1e-3), "parameter_norm": (1.0, 0.1, 2.0)}
    rows = [list({**usual, **signals}.get(name, (0.5, 0.5, 0.5))) for name in SIGNALS]
    return np.array(rows, "<f8").tobytes()


def found(records: Iterable[StepRecord], health: Health | None = None) -> list[Finding]:
    return (health or Health(NAMES, SHAPES)).observe(records)


def falling(steps: int) -> list[StepRecord]:
    noise = np.random.default_rng(0)
    return [
        record(i, 2.0 * 0.99**i * noise.uniform(0.7, 1.4), noise.uniform(0.2, 5), noise.uniform(1e-3, 1, 3), data=0.01)
        for i in range(steps)
    ]


def test_a_healthy_job_is_left_alone() -> None:
    assert found(falling(10_000)) == []


def test_a_vanishing_layer_is_named_once_it_lasts() -> None:
    small = [record(i, norms=(1e-8, 1e-9, 1.0)) for i in range(LASTING_STEPS)]
    assert found(small[:-1]) == []
    [finding] = found(small)
    assert (finding.rule, finding.layer, finding.step) == ("vanishing", "first.weight", LASTING_STEPS - 1)
    assert "1e-09" in finding.message
    assert "ReLU" in finding.message
    # Not in a job whose gradients are all small, nor for biases, which may have none for good reasons.
    assert found([record(i, norms=(1e-8, 1e-8, 1e-8)) for i in range(20)]) == []
    assert found([record(i, norms=(1.0, 0.0, 1.0)) for i in range(20)]) == []


def test_a_finding_comes_again_only_after_it_was_gone_for_long() -> None:
    health = Health(NAMES, SHAPES)
    sick = (1e-9, 1.0, 1.0)
    assert len(found([record(i, 1.0 - 1e-4 * i, norms=sick) for i in range(1000)], health)) == 1
    assert found([record(1000 + i, norms=sick if i % 50 == 49 else (1.0, 1.0, 1.0)) for i in range(200)], health) == []
    assert found([record(1200 + i, norms=(1.0, 1.0, 1.0)) for i in range(FORGET_STEPS)], health) == []
    assert len(found([record(1400 + i, 0.5, norms=sick) for i in range(10)], health)) == 1


def test_a_layer_without_any_gradient_is_dead() -> None:
    [finding] = found([record(i, norms=(0.0, 0.0, 1.0)) for i in range(10)])
    assert (finding.rule, finding.layer) == ("dead_units", "first.weight")


def test_an_explosion_is_seen_at_its_step() -> None:
    records = [record(i, norm=1.0 + 0.1 * (i % 3)) for i in range(50)]
    [finding] = found([*records, record(50, norm=1e4, norms=(1.0, 2.0, 1e4))])
    assert (finding.rule, finding.step, finding.layer) == ("exploding", 50, "last.weight")
    assert "--clip-norm 2" in finding.message


def test_a_loss_above_the_first_is_diverging() -> None:
    [finding] = found([record(i, loss=1.0 if i < 20 else 1.3 ** (i - 20)) for i in range(40)])
    assert finding.rule == "diverging"
    assert finding.step < 30


def test_a_loss_that_does_not_move_is_stalled() -> None:
    [finding] = found([record(i, loss=2.3 + 0.001 * (i % 7)) for i in range(STALLED_STEPS + 50)])
    assert (finding.rule, finding.step) == ("stalled", STALLED_STEPS)
    assert found([record(i, loss=2.3 - 1e-4 * i) for i in range(STALLED_STEPS + 50)]) == []


def test_waiting_for_samples_is_input_bound() -> None:
    [finding] = found([record(i, data=0.08) for i in range(30)])
    assert (finding.rule, finding.severity) == ("input_bound", "warning")
    assert "80%" in finding.message


def test_a_skipped_step_is_not_finite() -> None:
    [finding] = found([record(i, norm=math.nan if i == 3 else 1.0, skipped=i == 3) for i in range(6)])
    assert (finding.rule, finding.step) == ("nonfinite", 3)


def test_evaluations_that_rise_while_training_falls_are_overfitting() -> None:
    health = Health(NAMES, SHAPES)
    said: list[Finding] = []
    for i, evaluation in enumerate([1.0, 0.8, 0.9, 0.95, 1.0, 1.1]):
        found([record(10 * i + k, loss=1.0 * 0.8**i) for k in range(10)], health)
        said += health.observe_evaluation(10 * i + 10, evaluation)
    [finding] = said
    assert (finding.rule, finding.step) == ("overfitting", 50)
    assert "--patience" in finding.message


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(*[st.floats()] * 3), max_size=30), st.lists(st.floats(), max_size=5))
def test_any_numbers_are_taken(numbers: list[tuple[float, float, float]], norms: list[float]) -> None:
    health = Health(NAMES, SHAPES)
    found([record(i, loss, norm, norms, data=data) for i, (loss, norm, data) in enumerate(numbers)], health)
    for loss, _, _ in numbers:
        health.observe_evaluation(0, loss)


@pytest.mark.parametrize("cut", [1, 7, 100])
def test_how_records_come_in_does_not_matter(cut: int) -> None:
    records = [record(i, loss=1.0 if i < 20 else 1.3 ** (i - 20), norms=(1e-9, 1, 1)) for i in range(60)]
    health = Health(NAMES, SHAPES)
    pieces = [found(records[i : i + cut], health) for i in range(0, len(records), cut)]
    assert [finding for piece in pieces for finding in piece] == found(records)


def test_signals_of_a_healthy_job_say_nothing() -> None:
    assert found([record(i, signals={}) for i in range(100)]) == []


def test_weights_that_begin_too_large_or_too_small_are_named() -> None:
    health = Health(NAMES, SHAPES, {"first.weight": 10, "last.weight": 100})
    # A standard deviation of 1 / sqrt(fan-in) is a norm of 3.2 for both.
    assert found([record(0, signals={"parameter_norm": (3.1, 0.0, 3.1)})], health) == []
    [finding] = found([record(0, signals={"parameter_norm": (3.1, 0.0, 100.0)})], health)
    assert (finding.rule, finding.layer, finding.step) == ("initialization", "last.weight", 0)
    assert "too large" in finding.message
    [finding] = found([record(0, signals={"parameter_norm": (1e-4, 0.0, 3.1)})], health)
    assert (finding.rule, finding.layer) == ("initialization", "first.weight")
    # Zeros are how residual branches and adapters begin, and of what is no layer of torch's nothing is known.
    assert found([record(0, signals={"parameter_norm": (0.0, 0.0, 3.1)})], health) == []
    assert found([record(0, signals={"parameter_norm": (99.0, 9.0, 99.0)})]) == []


def test_updates_out_of_proportion_are_named() -> None:
    huge = [record(i, signals={"update_norm": (3.0, 9.0, 0.1)}) for i in range(3)]
    [finding] = found(huge)
    assert (finding.rule, finding.severity, finding.layer) == ("update_ratio", "critical", "first.weight")
    large = [record(i, signals={"update_norm": (1e-3, 9.0, 0.5)}) for i in range(MEASURED_STEPS)]
    assert found(large[:-1]) == []
    [finding] = found(large)
    assert (finding.rule, finding.severity, finding.layer) == ("update_ratio", "warning", "last.weight")


def test_updates_too_small_to_learn_are_named() -> None:
    tiny = {"update_norm": (1e-6, 1e-6, 1e-6)}
    [finding] = found([record(i, 1.0, signals=tiny) for i in range(MEASURED_STEPS)])
    assert (finding.rule, finding.layer) == ("update_ratio", None)
    assert "too small" in finding.message
    # Not while the rate warms up, nor of a job that learns.
    assert found([record(i, 1.0, lr=1e-6 * (i + 1), signals=tiny) for i in range(MEASURED_STEPS)]) == []
    assert found([record(i, 0.9**i, signals=tiny) for i in range(50)]) == []


def test_an_update_that_stands_out_is_named_at_its_step() -> None:
    steps = [record(i, signals={}) for i in range(30)]
    spike = record(30, signals={"update_norm": (1e-3, 1e-3, 0.05)})
    [finding] = found([*steps, spike])
    assert (finding.rule, finding.layer, finding.step) == ("update_spike", "last.weight", 30)


def test_a_worker_that_lags_is_named_once_it_lasts() -> None:
    slow = [record(i, slowest=(2, 3.0)) for i in range(STRAGGLING_STEPS)]
    assert found(slow[:-1]) == []
    [finding] = found(slow)
    assert (finding.rule, finding.worker) == ("straggler", "worker-2")
    taking_turns = [record(i, slowest=(i // 5 % 2, 3.0)) for i in range(100)]
    assert found(taking_turns) == []


def test_what_begins_at_zero_may_grow() -> None:
    norms = [0.0, *(0.01 * i for i in range(1, 40))]
    steps = [
        record(i, signals={"update_norm": (0.01, 0.0, 1e-3), "parameter_norm": (norm, 0.0, 2.0)})
        for i, norm in enumerate(norms)
    ]
    assert found(steps) == []


def test_small_gradients_of_a_job_that_has_converged_are_no_fault() -> None:
    steps = [record(i, 1.0 if i < 10 else 0.01, norms=(1.0, 0.0, 1.0)) for i in range(20)]
    assert found([*steps, *(record(i, 0.01, norms=(1e-8, 0.0, 1.0)) for i in range(20, 60))]) == []
    assert found([*steps, *(record(i, 0.5, norms=(1e-8, 0.0, 1.0)) for i in range(20, 60))]) != []


def test_a_layer_at_the_end_of_its_range_is_saturated() -> None:
    health = Health(NAMES, SHAPES, activations=("1", "3"))
    shares = np.array([0.1, 0.95, 1.0, 1.0], "<f8").tobytes()
    [finding] = found([record(i)._replace(activations=shares) for i in range(LASTING_STEPS)], health)
    assert (finding.rule, finding.layer, finding.step) == ("saturated", "3", LASTING_STEPS - 1)
    fine = np.array([math.nan, 0.5, 9.0, 9.0], "<f8").tobytes()
    assert found([record(i)._replace(activations=fine) for i in range(100)], health) == []


def test_a_layer_that_is_looked_at_in_turn_counts_as_it_was_seen_last() -> None:
    turns = [np.array([0.95, math.nan, 1.0, math.nan]), np.array([math.nan, 0.1, math.nan, 1.0])]
    records = [record(i)._replace(activations=turns[i % 2].astype("<f8").tobytes()) for i in range(LASTING_STEPS)]
    [finding] = found(records, Health(NAMES, SHAPES, activations=("1", "3")))
    assert (finding.rule, finding.layer) == ("saturated", "1")
