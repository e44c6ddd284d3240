"""The promise: where a job runs never shows in its bits."""

from __future__ import annotations

import math
import time
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from harness.local_job import hashes, job_config, run_here, run_processes, running
from ps.checkpoint.files import newest_verified, read_records
from tests.support.choices import full

pytestmark = pytest.mark.cluster

JOBS: dict[str, dict[str, Any]] = {
    "convnet with batch norm": {
        "task": "examples.digits:convnet",
        "steps": 6,
        "clip": {"norm": 1.0},
        "data": {"micro_batch": 8},
    },
    "transformer with dropout and tied embeddings": {
        "task": "examples.charlm:transformer",
        "arguments": {"width": 128, "layers": 1},
        "steps": 3,
        "data": {"global_batch": 16, "micro_batch": 2},
    },
    "ragged data": {
        "task": "tests.support.tasks:regression",
        "arguments": {"hidden": 20_000},
        "epochs": 3,
        "data": {"global_batch": 37, "micro_batch": 5},
        "clip": {"value": 0.001},
        "optimizer": {"name": "rmsprop", "momentum": 0.5, "decay_biases_and_norms": False, "weight_decay": 0.1},
    },
    "dataset with noise": {
        "task": "tests.support.tasks:slow",
        "arguments": {"delay": 0.0},
        "epochs": 2,
        "clip": {"autoclip": {"percentile": 50}},
        "data": {"micro_batch": 8},
    },
    "bf16": {
        "task": "examples.digits:convnet",
        "steps": 6,
        "precision": "bf16",
        "clip": {"zclip": {"warmup_steps": 2, "threshold": 0.1}},
        "data": {"micro_batch": 8},
    },
    "whole parameters": {
        "task": "tests.support.tasks:regression",
        "arguments": {"hidden": 400},
        "epochs": 2,
        "data": {"global_batch": 37, "micro_batch": 5},
        "clip": {"norm": 0.01},
        "optimizer": {"name": "muon", "adamw": ["2.*"], "weight_decay": 0.1, "decay_biases_and_norms": False},
    },
    "an optimizer with lists and counts": {
        "task": "tests.support.tasks:regression",
        "epochs": 2,
        "data": {"micro_batch": 8},
        "optimizer": {"name": "tests.support.optimizers:RowSigns", "lr": 0.01, "options": {"warmup": 3}},
    },
    "clipped unit by unit": {
        "task": "tests.support.tasks:regression",
        "arguments": {"hidden": 400},
        "epochs": 2,
        "data": {"global_batch": 37, "micro_batch": 5},
        "clip": {"agc": {"clipping": 0.001, "exclude": ["2.*"]}},
    },
    "clipped by the means of each parameter": {
        "task": "tests.support.tasks:regression",
        "arguments": {"hidden": 20_000},
        "epochs": 3,
        "data": {"global_batch": 37, "micro_batch": 5},
        "clip": {"adagc": {"warmup_steps": 2, "absolute": 0.01}},
        "optimizer": {"name": "adam", "decay_biases_and_norms": False, "weight_decay": 0.1},
    },
    "analytic": {
        "task": "tests.support.tasks:least_squares",
        "epochs": 2,
        "data": {"micro_batch": 8},
        "optimizer": {"name": "nesterov"},
    },
}


def _config(directory: Path, name: str, **placement: Any) -> Any:
    return job_config(directory, **{**JOBS[name], "placement": placement})


@cache
def _expected(name: str) -> tuple[str, str]:
    """The hashes of one worker and one server in one process."""
    with TemporaryDirectory() as directory:
        return hashes(run_here(_config(Path(directory), name)))


QUICK = [
    ("convnet with batch norm", 3, 2, "auto"),
    ("transformer with dropout and tied embeddings", 2, 2, "inline"),
    ("ragged data", 3, 1, "auto"),
]


@pytest.mark.parametrize(
    ("name", "workers", "servers", "transport"),
    [
        pytest.param(*c) if c in QUICK else full(*c)
        for c in product(list(JOBS)[:3], (1, 2, 3, 5), (1, 2, 3), ("auto", "inline"))
    ],
)
def test_same_bits_at_every_placement(name: str, workers: int, servers: int, transport: str, tmp_path: Path) -> None:
    config = _config(tmp_path, name, servers=servers, transport=transport)
    assert hashes(run_processes(config, workers)) == _expected(name)


@pytest.mark.parametrize("name", list(JOBS)[3:])
@pytest.mark.parametrize(("workers", "servers", "transport"), [(3, 2, "auto"), full(2, 3, "inline")])
def test_same_bits_of_other_tasks(name: str, workers: int, servers: int, transport: str, tmp_path: Path) -> None:
    config = _config(tmp_path, name, servers=servers, transport=transport)
    assert hashes(run_processes(config, workers)) == _expected(name)


@pytest.mark.parametrize("transport", ["auto", full("inline")])
def test_workers_killed_and_replaced_in_mid_step_leave_no_trace(transport: str, tmp_path: Path) -> None:
    raw = {**JOBS["dataset with noise"], "epochs": 12, "arguments": {"delay": 0.004}}
    expected = hashes(run_here(job_config(tmp_path / "one", **raw)))
    config = job_config(tmp_path / "many", **{**raw, "placement": {"servers": 2, "transport": transport}})
    with running(config, 3) as job:
        for round_, victim in enumerate(["worker-1", "worker-0", "worker-2", "worker-1"]):
            job.wait_for_step(2 + 5 * round_)
            job.kill_worker(victim)
            if round_ % 2:
                time.sleep(0.05)
            job.start_worker(victim)
        assert hashes(job.finish()) == expected


def test_runs_with_another_seed_differ(tmp_path: Path) -> None:
    raw = {**JOBS["ragged data"], "seed": 1}
    assert hashes(run_here(job_config(tmp_path, **raw))) != _expected("ragged data")


@pytest.mark.parametrize(
    ("name", "how"),
    [("convnet with batch norm", "sqrt"), ("transformer with dropout and tied embeddings", "all")],
)
def test_activations_that_are_computed_again_leave_no_trace(name: str, how: str, tmp_path: Path) -> None:
    raw = {**JOBS[name], "memory": {"checkpoint_activations": how}, "placement": {"servers": 2}}
    if how == "all":  # its one layer has no list of four or more in it
        raw["memory"] = {"checkpoint_activations": "*layer*"}
    assert hashes(run_processes(job_config(tmp_path, **raw), 2)) == _expected(name)


@pytest.mark.parametrize(("workers", "transport"), [(1, "auto"), (3, "inline")])
def test_curvature_is_the_same_at_every_placement_and_changes_nothing(
    workers: int, transport: str, tmp_path: Path
) -> None:
    name = "transformer with dropout and tied embeddings"
    raw = {**JOBS[name], "telemetry": {"curvature_every": 2}}
    measured = []
    for directory, count in ((tmp_path / "one", 1), (tmp_path / "other", workers)):
        directory.mkdir()
        config = job_config(directory, **raw, placement={"servers": 2, "transport": transport})
        assert hashes(run_processes(config, count)) == _expected(name)
        written = newest_verified(config.checkpoint_directory)
        assert written is not None
        measured.append([(r.sharpness, r.smallest_eigenvalue) for r in read_records(written.path)[1]])
    assert repr(measured[0]) == repr(measured[1])  # with what is not a number
    assert [math.isfinite(sharpness) for sharpness, _ in measured[0]] == [True, False, True]
    assert all(sharpness > smallest for sharpness, smallest in measured[0][::2])
