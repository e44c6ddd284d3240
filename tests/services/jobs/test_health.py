from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.step.messages import StepRecord
from services.jobs.health import FORGET_STEPS, LASTING_STEPS, STALLED_STEPS, Health
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
) -> StepRecord:
    falling = 1.0 / (1 + step)
    return StepRecord(
        step, float(step), falling if loss is None else loss, 0.1, 4.0, 4, norm, norm, 1.0, False, skipped, 1, 0.1, 0.1,
        0.0, 0.0, np.array(list(norms), "<f8").tobytes(), data,
    )  # fmt: skip


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
    assert len(found([record(i, norms=sick) for i in range(1000)], health)) == 1
    assert found([record(1000 + i, norms=sick if i % 50 == 49 else (1.0, 1.0, 1.0)) for i in range(200)], health) == []
    assert found([record(1200 + i, norms=(1.0, 1.0, 1.0)) for i in range(FORGET_STEPS)], health) == []
    assert len(found([record(1400 + i, norms=sick) for i in range(10)], health)) == 1


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
    [finding] = found([record(i, skipped=i == 3) for i in range(6)])
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
