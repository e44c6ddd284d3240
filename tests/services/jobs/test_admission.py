from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event

import pytest

from services.jobs import admission
from services.jobs.admission import Admission, take_over
from services.jobs.code_bundles import CodeStore
from services.jobs.controller import Controller
from services.jobs.running import Running
from services.settings import Settings
from services.store.lifecycle import JobState
from services.store.store import Store
from steepest.spec import spec_from_dict
from tests.support.cluster import Cluster, Probe
from tests.support.rows import job_row
from tests.support.service import until

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


def test_of_equals_the_owner_who_holds_least_is_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(2)
    monkeypatch.setattr(admission, "ADMIT_SECONDS", 0.01)
    monkeypatch.setattr(admission, "Controller", partial(Controller, dial=cluster.dial))
    store, running, wake = Store(f"sqlite:///{tmp_path / 'jobs.db'}"), Running(), Event()
    settings, bundles = Settings(data_directory=tmp_path), CodeStore(tmp_path / "code", 1 << 20)
    spec = spec_from_dict({"task": {"module": "m", "function": "f"}, "steps": 10})
    description = Probe().describe(spec, None, 1.0).to_json()
    for number, (job, owner) in enumerate([("a1", "ada"), ("a2", "ada"), ("a3", "ada"), ("b1", "bob"), ("c1", "cy")]):
        row = job_row(job, job, float(number))
        store.create(replace(row, owner=owner, spec=spec.model_dump_json(), description=description))
    admitting = Admission(store, bundles, cluster, running, settings, wake)  # type: ignore[arg-type]
    admitting.start()

    def live() -> set[str]:
        return {row.id for row in store.in_states({_S.RUNNING})}

    until(lambda: len(live()) == 2)
    assert live() == {"a1", "b1"}  # and not a2, which is older
    for expected in ({"a1", "c1"}, {"a1", "a2"}):
        ended = (live() - expected).pop()
        store.move(ended, _S.CANCELLING, "cancel requested", 9.0)
        running.get(ended).ask("cancel")  # type: ignore[union-attr]
        until(lambda wanted=expected: live() == wanted)
    admitting.stop()
    store.close()
