"""Lossy jobs: the same bits wherever they run, whoever comes and goes, and nothing is lost on the way."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from ps.checkpoint import State, state_hashes
from tests.local_job import job_config, run_here, run_processes

pytestmark = pytest.mark.cluster

COMPRESSIONS: dict[str, dict[str, Any]] = {
    "bf16": {"name": "bf16"},
    "fp16": {"name": "fp16", "parts": 2},
    "topk": {"name": "topk", "ratio": 0.1},
    "topk both ways": {"name": "topk", "pull": "topk", "parts": 3},
    "powersgd": {"name": "powersgd", "rank": 2},
    "powersgd one way": {"name": "powersgd", "pull": "none", "parts": 1},
    "ternary": {"name": "ternary", "parts": 4},
}


def _config(directory: Path, compression: str, **placement: Any) -> Any:
    return job_config(
        directory,
        task="tests.tasks:regression",
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


@pytest.mark.parametrize("compression", list(COMPRESSIONS))
@pytest.mark.parametrize(("workers", "servers"), [(3, 1), (2, 2), (5, 3)])
def test_same_bits_at_every_placement(compression: str, workers: int, servers: int, tmp_path: Path) -> None:
    config = _config(tmp_path, compression, servers=servers)
    assert digest(run_processes(config, workers)) == _expected(compression)
