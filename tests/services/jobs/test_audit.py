"""What the audit log has of calls."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from services.jobs import audit
from services.jobs.audit import Audit, Call
from steepest.errors import ConflictError, NotFoundError, PermissionDeniedError, TooManyCallsError, UnauthenticatedError


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("changes", [True, False])
def test_changes_and_refusals_are_noted(tmp_path: Path, *, changes: bool) -> None:
    kept = Audit(tmp_path / "audit.jsonl")
    with kept.of(Call("CancelTrainingJob", "ipv4:192.0.2.1:5"), changes=changes) as call:
        call.caller, call.target = "ada", "trainingJobs/a\n"
    errors = (PermissionDeniedError("no"), UnauthenticatedError("who"), ConflictError("late"), NotFoundError("none"))
    for error in (*errors, TooManyCallsError("again")):  # the last would push out all else
        with pytest.raises(type(error)), kept.of(Call("M", "p", "t" * 1000), changes=changes):
            raise error
    found = lines(tmp_path / "audit.jsonl")
    outcomes = ["ok", "PermissionDenied", "Unauthenticated", "Conflict", "NotFound"]
    assert [line["outcome"] for line in found] == (outcomes if changes else outcomes[1:3])
    assert all(len(line["target"]) <= 200 for line in found)
    if changes:
        first = {
            "caller": "ada",
            "method": "CancelTrainingJob",
            "target": "trainingJobs/a\n",
            "peer": "ipv4:192.0.2.1:5",
        }
        assert first.items() <= found[0].items()
        assert found[0]["time"].endswith("+00:00")


def test_it_is_whole_and_takes_no_more_room_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MAX_BYTES", 10_000)
    monkeypatch.setattr(audit, "NUM_FILES", 3)
    kept = Audit(tmp_path / "audit.jsonl")

    def call(number: int) -> None:
        for index in range(100):
            with kept.of(Call("M", "p", f"{number}-{index}"), changes=True):
                pass

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2", "audit.jsonl.3"]
    assert all(file.stat().st_size <= 10_000 for file in files)
    found = [line for file in files for line in lines(file)]
    assert len({line["target"] for line in found}) == len(found) > 250


def test_a_full_disk_ends_no_call(tmp_path: Path) -> None:
    kept = Audit(Path("/dev/full"))
    with kept.of(Call("M", "p"), changes=True) as call:
        call.caller = "ada"
    kept.close()
