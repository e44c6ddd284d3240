"""What a list says of jobs, some of which it has said before."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from services.api import servicer
from services.api.servicer import TrainingJobServicer
from services.settings import Settings
from services.store.lifecycle import JobState
from services.store.store import Result, Store
from steepest.spec import spec_from_dict
from steepest.v1 import training_jobs_pb2 as pb
from tests.support.rows import job_row

SPEC = spec_from_dict({"task": {"module": "m", "function": "f"}, "steps": 10}).model_dump_json()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"sqlite:///{tmp_path / 'steepest.db'}")


@pytest.fixture
def asked(store: Store, tmp_path: Path) -> TrainingJobServicer:
    """Only what reads the store is used."""
    return TrainingJobServicer(Mock(), store, Settings(data_directory=tmp_path), Mock(), Mock(), threading.Event())


def listed(asked: TrainingJobServicer) -> list[pb.TrainingJob]:
    return list(asked.ListTrainingJobs(pb.ListTrainingJobsRequest(), Mock()).training_jobs)


def test_a_job_that_has_ended_is_as_it_is_now(asked: TrainingJobServicer, store: Store) -> None:
    ended = replace(job_row("a"), spec=SPEC, state=JobState.SUCCEEDED, ended=5.0, result=Result(step=9))
    store.create(ended)
    [first] = listed(asked)
    assert (first.status.step, first.status.wall_seconds) == (9, 4.0)
    assert listed(asked) == [first]
    store.update("a", result=Result(step=10, parameters_sha256="ab"))
    [second] = listed(asked)
    assert (second.status.step, second.status.parameters_sha256) == (10, "ab")
    store.delete("a")
    assert not listed(asked)
    store.create(replace(ended, request_id="other", created=2.0))
    [third] = listed(asked)
    assert (third.status.step, third.status.wall_seconds, third.create_time.seconds) == (9, 3.0, 2)


def test_no_more_are_kept_than_so_many(
    asked: TrainingJobServicer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servicer, "MAX_ENDED", 3)
    for number in range(8):
        row = replace(job_row(f"job-{number}", str(number)), spec=SPEC, state=JobState.FAILED, ended=2.0)
        store.create(replace(row, reason=f"reason {number}"))
    for _ in range(2):
        assert {job.status.reason for job in listed(asked)} == {f"reason {number}" for number in range(8)}
        assert len(asked._of_ended) <= 3
