from __future__ import annotations

import math

import numpy as np
import pytest

from ps.parameters.layout import BLOCK_NUMEL, build_layout
from ps.step.messages import Decision, Round
from ps.step.record import CompletedStep, records_of
from tests.support.models import described


def completed(**changes: object) -> CompletedStep:
    values = {
        "decision": Decision(4, Round.TRAIN, True, 2.0, 0.5, 0.1),
        "loss": 3.0, "norm": 5.0, "clipped_norm": 2.5, "weight": 2.0, "samples": 8, "workers": 2,
        "segment_sums": np.array([36.0, 64.0]), "clipped_sum": None,
        "began": 10.0, "collected": 11.0, "reported": 11.5, "committed": 12.0,
    } | changes  # fmt: skip
    return CompletedStep(**values)  # type: ignore[arg-type]


def test_the_record_of_a_step() -> None:
    record = completed().record()
    assert (record.step, record.loss, record.lr, record.samples) == (4, 3.0, 0.1, 8)
    assert (record.gradient_norm, record.clipped_norm, record.clip_coefficient) == (5.0, 2.5, 0.5)
    assert record.clipped
    assert not record.skipped
    times = (record.step_seconds, record.compute_seconds, record.reduce_seconds, record.apply_seconds)
    assert times == (2.0, 1.0, 0.5, 0.5)
    assert record.parameter_norms == b""


def test_a_clip_by_value_is_measured_by_the_shards() -> None:
    record = completed(clipped_sum=9.0, decision=Decision(4, Round.TRAIN, True, 2.0, 1.0, 0.1)).record()
    assert (record.clipped_norm, record.clip_coefficient) == (3.0, 0.6)


def test_norms_of_parameters_are_of_the_mean_gradient() -> None:
    layout = build_layout(described([(BLOCK_NUMEL + 16,), (0,), (4,)]))
    sums = np.array([3.0, 6.0, 16.0])  # the first parameter lies in two blocks
    (first,) = records_of([completed(segment_sums=sums)], layout)
    norms = np.frombuffer(first.parameter_norms, dtype="<f8").tolist()
    assert norms == [pytest.approx(1.5), 0.0, 2.0]
    assert math.fsum(n**2 for n in norms) == pytest.approx(sums.sum() / 4)
    assert records_of([completed()], None)[0].parameter_norms == b""
