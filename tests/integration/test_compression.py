"""Lossy jobs: the same bits wherever they run, whoever comes and goes, and nothing is lost on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from harness.local_job import job_config, run_here, run_processes
from ps.checkpoint.files import State, state_hashes
from steepest.client import Client, Job
from steepest.errors import SpecError
from steepest.jobs import Event
from tests.support.choices import full
from tests.support.service import TASKS, until

pytestmark = pytest.mark.cluster

COMPRESSIONS: dict[str, dict[str, Any]] = {
    "bf16": {"name": "bf16"},
    "fp16": {"name": "fp16", "parts": 2},
    "topk": {"name": "topk", "ratio": 0.1},
    "topk both ways": {"name": "topk", "pull": "topk", "parts": 3},
    "powersgd": {"name": "powersgd", "rank": 2},
    "powersgd one way": {"name": "powersgd", "pull": "none", "parts": 1},
    "twobit": {"name": "twobit", "parts": 4},
}


def _config(directory: Path, compression: str, **placement: Any) -> Any:
    return job_config(
        directory,
        task="tests.support.tasks:regression",
        arguments={"hidden": 20_000},
        epochs=3,
        data={"global_batch": 37, "micro_batch": 5},
        clip={"norm": 1.0},
        compression=COMPRESSIONS[compression],
        placement=placement,
    )


def digest(state: State) -> tuple[str, str, tuple[tuple[str, bytes], ...]]:
    """All there is of a state, residuals included."""
    kept = sorted(state.compression.items())
    return (*state_hashes(state), tuple((name, tensor.numpy().tobytes()) for name, tensor in kept))


@cache
def _expected(compression: str) -> tuple[str, str, tuple[tuple[str, bytes], ...]]:
    """Of one worker and one server in one process."""
    with TemporaryDirectory() as directory:
        return digest(run_here(_config(Path(directory), compression)))


@pytest.mark.parametrize(("workers", "servers"), [full(3, 1), (2, 2), full(5, 3)])
@pytest.mark.parametrize("compression", [c if c == "powersgd" else full(c) for c in COMPRESSIONS])
def test_same_bits_at_every_placement(compression: str, workers: int, servers: int, tmp_path: Path) -> None:
    config = _config(tmp_path, compression, servers=servers)
    assert digest(run_processes(config, workers)) == _expected(compression)


def test_the_residuals_are_kept(tmp_path: Path) -> None:
    state = run_here(_config(tmp_path, "topk"))
    residuals = [name for name in state.compression if name.startswith("residual.")]
    assert len(residuals) == 8 * 4
    assert all(state.compression[f"residual.{part}.0.weight"].any() for part in range(8))
    assert not torch.equal(state.compression["master.0.weight"], state.model["0.weight"])


@pytest.mark.parametrize("compression", [full("topk both ways"), full("powersgd")])
def test_a_job_goes_on_from_its_checkpoint_with_the_same_bits(compression: str, tmp_path: Path) -> None:
    config = _config(tmp_path, compression, servers=2)
    shorter = replace(config, spec=config.spec.model_copy(update={"epochs": 1}))
    run_processes(shorter, 2)
    assert digest(run_processes(config, 3)) == _expected(compression)


# -- through the service -----------------------------------------------------------------------------------------------

SLOW: dict[str, Any] = {
    "arguments": {"delay": 0.02},
    "steps": 90,
    "data": {"global_batch": 24, "micro_batch": 3},
    "checkpoint_every": 20,
    "compression": {"name": "powersgd", "rank": 1},
}


@pytest.fixture(scope="module")
def undisturbed(client: Client) -> str | None:
    job = client.submit(f"{TASKS}:slow", **{**SLOW, "arguments": {"delay": 0.0}})
    return job.wait().parameters_sha256


@pytest.mark.full
def test_scaling_and_pausing_leave_no_trace(submit: Callable[..., Job], undisturbed: str | None) -> None:
    job = submit("slow", **SLOW)
    until(lambda: job.get().step >= 2)
    job.scale(3)
    until(lambda: any(record["workers"] == 3 for record in job.history()))
    job.pause()
    until(lambda: job.get().state == "PAUSED")
    job.scale(2)
    job.resume()
    until(lambda: len(job.get().workers) == 2)
    assert job.wait().parameters_sha256 == undisturbed
    assert {record["workers"] for record in job.history()} == {1, 2, 3}


@pytest.mark.full
def test_a_killed_worker_costs_only_the_steps_since_the_checkpoint(
    submit: Callable[..., Job], undisturbed: str | None
) -> None:
    job = submit("slow", **SLOW, placement={"workers": 2, "servers": 2})
    until(lambda: job.get().step >= 30)
    os.kill(job.get().workers[1].pid, signal.SIGKILL)
    info = job.wait()
    assert info.parameters_sha256 == undisturbed
    said = "\n".join(update.reason for update in job.watch() if isinstance(update, Event))
    assert "worker-1 is gone, and the compression residuals it held are lost" in said
    assert [record["step"] for record in job.history()] == list(range(90))


def test_a_step_that_is_not_finite_is_skipped_without_a_trace_in_the_residuals(submit: Callable[..., Job]) -> None:
    job = submit(
        "nonfinite_loss",
        steps=8,
        data={"global_batch": 64},
        on_nonfinite="skip",
        compression={"name": "twobit"},
    )
    assert job.wait().state == "SUCCEEDED"
    # One of the two steps of each epoch has the bad sample.
    assert sum(record["skipped"] for record in job.history()) == 4


def test_what_is_of_no_use_for_a_model_is_refused(client: Client) -> None:
    with pytest.raises(SpecError, match=r"compression\.name: 'powersgd': compression\.rank = 500 makes none"):
        client.submit(f"{TASKS}:regression", steps=2, compression={"name": "powersgd", "rank": 500})
