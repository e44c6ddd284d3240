"""What `steepest top` draws."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from steepest.cli.service import ENDED_SHOWN, _table
from tests.steepest.test_records import info


@pytest.mark.parametrize("width", [80, 140])
def test_names_states_and_progress_are_never_cut(width: int) -> None:
    live = info(job="trainingJobs/a-name-that-is-rather-long-1a2b3c", state="RUNNING", step=3, reason="long " * 40)
    ended = [replace(info(), job=f"trainingJobs/done-{number}") for number in range(ENDED_SHOWN + 3)]
    console = Console(file=io.StringIO(), width=width)
    console.print(_table([*ended, live], width))
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    lines = drawn.splitlines()
    assert lines[0].startswith("1 live jobs, 0 workers, 8 ended")
    assert "a-name-that-is-rather-long-1a2b3c" in lines[2]
    assert "RUNNING" in lines[2]
    assert "50%" in lines[2]
    assert drawn.count("SUCCEEDED") == ENDED_SHOWN
