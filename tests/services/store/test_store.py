from __future__ import annotations

import math
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ps.step.messages import StepRecord
from services.store.lifecycle import JobState
from services.store.store import JobRow, Result, Store
from steepest.errors import ConflictError, NotFoundError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(f"sqlite:///{tmp_path / 'jobs.db'}")
    yield made
    made.close()


def job(name: str = "a", request: str = "", created: float = 1.0) -> JobRow:
    return JobRow(name, request, "{}", "{}", JobState.QUEUED, "created", 1, 0, 10, created, None, Result())


def record(step: int, time: float = 0.0, loss: float = 1.0) -> StepRecord:
    return StepRecord(step, time, loss, 0.1, 4.0, 4, 2.0, 1.0, 0.5, True, False, 1, 0.1, 0.1, 0.0, 0.0)


def test_a_job_comes_back_as_it_was(store: Store) -> None:
    members = (("worker", "w", 1, "h", "ok"),)
    row = replace(job(), result=Result(3, 12, 0.5, {"accuracy": 0.9}, "p", "s", "", 2, members))
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


def test_pages_run_from_new_to_old_without_gap(store: Store) -> None:
    for number in range(5):
        store.create(job(f"j{number}", created=float(number // 2)))
    seen: list[str] = []
    before = None
    while page := store.page(2, before):
        seen += [r.id for r in page]
        before = (page[-1].created, page[-1].id)
    assert seen == ["j4", "j3", "j2", "j1", "j0"]


def test_history_keeps_what_is_not_finite_and_hides_what_was_rewound(store: Store) -> None:
    store.create(job())
    store.append_history("a", 1, [record(0), record(1, loss=math.nan), record(2)])
    assert math.isnan(store.history_of("a")[1].loss)
    store.rewind("a", 1)
    assert [r.step for r in store.history_of("a")] == [0]
    store.append_history("a", 2, [record(1, loss=5.0)])
    assert [r.loss for r in store.history_of("a")] == [1.0, 5.0]
    last = store.last_record("a")
    assert last is not None
    assert last.step == 1


def test_what_is_missing_is_filled_in_once(store: Store) -> None:
    store.create(job())
    store.append_history("a", 1, [record(0), record(1)])
    store.rewind("a", 1)
    store.fill_history("a", 2, [record(0, loss=7.0), record(1, loss=8.0), record(2)])
    store.fill_history("a", 2, [record(2, loss=9.0)])
    assert [(r.step, r.loss) for r in store.history_of("a")] == [(0, 1.0), (1, 8.0), (2, 1.0)]


def test_the_norms_of_parameters_keep_every_bit(store: Store) -> None:
    store.create(job())
    store.append_history("a", 1, [record(0)._replace(parameter_norms=b"norms"), record(1)])
    assert [r.parameter_norms for r in store.history_of("a")] == [b"norms", b""]


def test_throughput_is_over_the_last_half(store: Store) -> None:
    store.create(job())
    assert store.samples_per_second(["a"]) == {}
    times = [0.0, 10.0, 20.0, 30.0, 31.0, 32.0, 33.0]
    store.append_history("a", 1, [record(i, t) for i, t in enumerate(times)])
    assert store.samples_per_second(["a"])["a"] == 12 / 3


def test_what_was_acknowledged_is_there_after_a_restart(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    first = Store(url)
    first.create(job("a", "r1"))
    first.append_history("a", 1, [record(0)])
    first.close()
    second = Store(url)
    assert second.get("a").id == "a"
    assert len(second.history_of("a")) == 1
    second.close()
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
