"""What holds steps up, and traces."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from steepest.bottleneck import COLUMNS, bottleneck
from steepest.cli.console import BARS, spark
from steepest.records import Records
from steepest.trace import trace_events, write_trace


def columns(steps: int = 9, **values: float) -> dict[str, np.ndarray]:
    """Steps of 100 ms in which two workers compute for 80."""
    usual = dict.fromkeys(COLUMNS, 0.0) | {
        "step_seconds": 0.1, "compute_seconds": 0.08, "worker_seconds": 0.08, "mean_worker_seconds": 0.08,
        "reduce_seconds": 0.01, "apply_seconds": 0.01, "workers": 2.0,
    }  # fmt: skip
    return {name: np.full(steps, value) for name, value in (usual | values).items()}


@pytest.mark.parametrize(
    ("values", "word", "saves"),
    [
        ({}, "compute-bound", 0.08 / 3),
        ({"data_seconds": 0.05}, "input-bound", 0.05),
        ({"worker_seconds": 0.04, "mean_worker_seconds": 0.04}, "network-bound", 0.04),
        ({"mean_worker_seconds": 0.045}, "straggler-bound", 0.035),
        (
            {"compute_seconds": 0.05, "worker_seconds": 0.05, "mean_worker_seconds": 0.05, "apply_seconds": 0.04},
            "server-bound",
            0.05,
        ),
        ({"data_seconds": 0.03, "worker_seconds": 0.08, "mean_worker_seconds": 0.05}, "input-bound", 0.03),
        # Read ahead of the workers' own time, as without readers.
        ({"data_seconds": 0.06, "worker_seconds": 0.02, "mean_worker_seconds": 0.02}, "input-bound", 0.06),
        ({"worker_seconds": math.nan, "mean_worker_seconds": math.nan}, "compute-bound", 0.08 / 3),
    ],
)
def test_the_largest_part_that_can_be_saved_gives_the_word(values: dict[str, float], word: str, saves: float) -> None:
    found = bottleneck(columns(**values))
    assert found is not None
    assert (found.word, found.saves, found.seconds) == (word, pytest.approx(saves), pytest.approx(0.1))
    whole = sum(found.shares.values())
    assert whole == pytest.approx(1.0)
    assert found.remedy


def test_no_steps_have_no_bottleneck() -> None:
    assert bottleneck(columns(0)) is None
    assert bottleneck(columns(step_seconds=0.0)) is None


def test_a_trace_has_every_step_and_its_parts_one_after_another(tmp_path: Path) -> None:
    table = columns(3, data_seconds=0.02, worker_seconds=0.05, mean_worker_seconds=0.05)
    table |= {
        "step": np.array([4.0, 5.0, 6.0]),
        "time": 1e9 + 0.1 * np.arange(1, 4),
        "loss": np.array([1.0, 2.0, np.nan]),
    }
    write_trace(Records(table).between(5, None), tmp_path / "trace.json", "<a job>")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    steps = [e for e in events if e["name"].startswith("step ")]
    assert [(e["name"], e["ts"], e["dur"]) for e in steps] == [
        ("step 5", 0, pytest.approx(1e5)),
        ("step 6", pytest.approx(1e5, abs=1), pytest.approx(1e5)),
    ]
    assert steps[0]["args"]["loss"] == 2.0
    assert "loss" not in steps[1]["args"]
    parts = [e for e in events if e["ph"] == "X" and e not in steps and e["ts"] < 99_000]
    assert [e["name"] for e in parts] == ["waiting for data", "forward and backward", "messages", "reduce", "apply"]
    ends = np.cumsum([e["dur"] for e in parts])
    assert [e["ts"] for e in parts[1:]] == pytest.approx(ends[:-1].tolist(), abs=1)
    assert ends[-1] == pytest.approx(1e5)
    assert trace_events(Records({"step": np.empty(0)}), "nothing")


def test_a_line_of_bars() -> None:
    assert spark([0.0, 7.0, math.nan, 3.5]) == BARS[0] + BARS[7] + " " + BARS[4]
    assert spark([2.0, 2.0]) == BARS[0] * 2
    assert spark([]) == ""
    assert spark([1e-310, 0.0]) == BARS[7] + BARS[0]
    assert spark([1e308, -1e308, 0.0]) == BARS[7] + BARS[0] + BARS[4]
