from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from harness.local_job import hashes, job_config, run_here
from tests.support.choices import full

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(("start", "steps", "last"), [(2, 2, 3), full(4, 10, 13)])
def test_steps_are_recorded_and_no_bit_changes(
    start: int, steps: int, last: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, **telemetry: int) -> tuple[str, str]:
        return hashes(
            run_here(job_config(tmp_path / name, "tests.support.tasks:regression", steps=6, telemetry=telemetry))
        )

    assert run("plain") == run("profiled", profile_start=start, profile_steps=steps)
    path = tmp_path / "profiled" / "profiles" / f"worker-0-steps-{start}-{last}.json.gz"
    assert f"profile written to {path}" in capsys.readouterr().out
    trace = json.loads(gzip.decompress(path.read_bytes()))
    assert any(event.get("name") == "aten::addmm" for event in trace["traceEvents"])


def test_a_profile_that_cannot_be_written_costs_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profiles").write_text("a file is in the way")
    telemetry = {"profile_start": 0, "profile_steps": 1}
    run_here(job_config(tmp_path, "tests.support.tasks:regression", steps=3, telemetry=telemetry))
    assert "the profile could not be written" in capsys.readouterr().out
