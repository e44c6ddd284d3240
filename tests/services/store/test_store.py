from __future__ import annotations

import math
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from services.store.lifecycle import JobState
from services.store.store import NEWEST_EVALUATIONS, Newest, Result, Store
from steepest.errors import ConflictError, NotFoundError
from steepest.jobs import Finding
from tests.support.rows import job_row as job


@pytest.fixture
def store(new_url: Callable[[], str]) -> Iterator[Store]:
    made = Store(new_url())
    yield made
    made.close()


def test_a_job_comes_back_as_it_was(store: Store) -> None:
    members = (("worker", "w", 1, "h", "ok"),)
    findings = (Finding("nonfinite", "critical", 3, "said", "w", None, 0, (1, 2)), Finding("stalled", "warning", 9, ""))
    row = replace(job(), result=Result(3, 12, 0.5, {"accuracy": 0.9}, "p", "s", "", 2, findings, members))
    store.create(row)
    assert store.get("a") == row
    with pytest.raises(NotFoundError, match="trainingJobs/b"):
        store.get("b")


def test_the_same_request_gives_the_first_job_and_a_taken_name_is_refused(store: Store) -> None:
    first = store.create(job("a", "r1"))
    assert store.create(job("b", "r1")) == first
    with pytest.raises(ConflictError, match="taken"):
        store.create(job("a", "r2"))


def test_moves_are_checked_and_leave_events(store: Store) -> None:
    store.create(job())
    store.move("a", JobState.STARTING, "there is room", 2.0)
    with pytest.raises(ConflictError):
        store.move("a", JobState.SUCCEEDED, "no", 3.0)
    store.note("a", "a worker died", 3.0)
    store.move("a", JobState.RUNNING, "go", 4.0)
    store.move("a", JobState.RUNNING, "go", 5.0)  # nothing new
    store.move("a", JobState.SUCCEEDED, "done", 6.0)
    events = store.events_after("a", 0)
    assert [(e.sequence, e.state, e.reason) for e in events] == [
        (1, "QUEUED", "created"), (2, "STARTING", "there is room"), (3, "STARTING", "a worker died"),
        (4, "RUNNING", "go"), (5, "SUCCEEDED", "done"),
    ]  # fmt: skip
    assert [e.sequence for e in store.events_after("a", 3)] == [4, 5]
    assert store.get("a").ended == 6.0


def test_evaluations_are_kept_until_they_are_computed_again(store: Store) -> None:
    store.create(job())
    for step, loss in ((2, 1.0), (4, 0.5), (6, math.nan), (4, 0.25)):
        store.add_evaluation("a", step, {"loss": loss})
    assert [step for step, _ in store.evaluations_of("a")] == [2, 4, 6]
    assert store.evaluations_of("a")[1] == (4, {"loss": 0.25})
    store.rewind("a", 4)
    assert [step for step, _ in store.evaluations_of("a")] == [2, 4]


def test_the_newest_is_what_was_written_last(store: Store) -> None:
    assert store.newest("a") == Newest(0, [])
    store.create(job())
    assert store.newest("a") == Newest(1, [])
    store.note("a", "a worker died", 4.0)
    store.update("a", workers=2)
    assert store.newest("a") == Newest(2, [])
    store.move("a", JobState.STARTING, "there is room", 5.0)
    for step in range(NEWEST_EVALUATIONS + 5):
        store.add_evaluation("a", step, {"loss": 0.5})
    newest = store.newest("a")
    assert newest.event == 3
    assert [step for step, _ in newest.evaluations] == list(range(5, NEWEST_EVALUATIONS + 5))
    store.rewind("a", 2)
    assert store.newest("a").evaluations == [(step, {"loss": 0.5}) for step in range(3)]
    store.delete("a")
    assert store.newest("a") == Newest(0, [])


def test_what_was_acknowledged_is_there_after_a_restart(new_url: Callable[[], str]) -> None:
    url = new_url()
    first = Store(url)
    first.create(job("a", "r1"))
    first.close()
    second = Store(url)
    assert second.get("a").id == "a"
    second.close()


def test_zero_bytes_in_what_user_code_says_are_shown(store: Store) -> None:
    store.create(replace(job(), result=replace(Result(), error="a\x00b")))
    store.note("a", "said \x00 and died", 1.0)
    assert store.events_after("a", 1)[0].reason == "said \\x00 and died"
    assert store.get("a").result.error == "a\x00b"


def test_sqlite_is_in_wal_mode(tmp_path: Path) -> None:
    Store(f"sqlite:///{tmp_path / 'jobs.db'}").close()
    mode = sqlite3.connect(tmp_path / "jobs.db").execute("PRAGMA journal_mode").fetchone()
    assert mode == ("wal",)


def test_many_threads_lose_nothing(store: Store) -> None:
    store.create(job())

    def write(number: int) -> None:
        for i in range(20):
            store.note("a", f"{number}.{i}", 0.0)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = store.events_after("a", 1)
    assert [e.sequence for e in events] == list(range(2, 102))
    assert len({e.reason for e in events}) == 100
