from __future__ import annotations

from pathlib import Path

import pytest

from services.jobs.admission import take_over
from services.store.lifecycle import JobState
from services.store.store import Store
from tests.support.rows import job_row

_S = JobState
WAYS = {
    _S.QUEUED: [],
    _S.STARTING: [_S.STARTING],
    _S.RUNNING: [_S.STARTING, _S.RUNNING],
    _S.PAUSING: [_S.STARTING, _S.RUNNING, _S.PAUSING],
    _S.PAUSED: [_S.STARTING, _S.RUNNING, _S.PAUSING, _S.PAUSED],
    _S.RECOVERING: [_S.STARTING, _S.RECOVERING],
    _S.CANCELLING: [_S.STARTING, _S.RUNNING, _S.CANCELLING],
    _S.SUCCEEDED: [_S.STARTING, _S.RUNNING, _S.SUCCEEDED],
}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (_S.QUEUED, _S.QUEUED),
        (_S.STARTING, _S.RECOVERING),
        (_S.RUNNING, _S.RECOVERING),
        (_S.PAUSING, _S.PAUSED),
        (_S.PAUSED, _S.PAUSED),
        (_S.RECOVERING, _S.RECOVERING),
        (_S.CANCELLING, _S.CANCELLED),
        (_S.SUCCEEDED, _S.SUCCEEDED),
    ],
)
def test_what_a_new_service_does_with_the_jobs_of_the_last(before: JobState, after: JobState, tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'jobs.db'}")
    store.create(job_row())
    for state in WAYS[before]:
        store.move("a", state, "on the way", 2.0)
    take_over(store, 3.0)
    assert store.get("a").state == after
    said = store.events_after("a", 0)[-1].reason
    assert ("the service was restarted" in said) == (before != after)
    store.close()
