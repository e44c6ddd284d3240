"""Jobs are deleted some time after they ended, and no others."""

from __future__ import annotations

import io
import json
import os
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.jobs.code_bundles import CodeStore
from services.jobs.operations import Operations
from services.jobs.retention import DAY_SECONDS, Retention
from services.jobs.running import Running
from services.settings import Settings
from services.store.lifecycle import JobState
from services.store.store import JobRow, Result, Store
from steepest.errors import SpecError

NOW = 1_000_000.0


def row(job: str) -> JobRow:
    return JobRow(job, "", "{}", "{}", JobState.QUEUED, "created", 1, 0, 10, 0.0, None, Result())


@pytest.fixture
def store(tmp_path: Path) -> Any:
    store = Store(f"sqlite:///{tmp_path / 'steepest.db'}")
    yield store
    store.close()


def test_what_ended_long_ago_is_deleted_with_its_files(tmp_path: Path, store: Store) -> None:
    settings, running, nothing = Settings(data_directory=tmp_path), Running(), SimpleNamespace(set=lambda: None)
    unused: Any = None
    operations = Operations(store, unused, unused, unused, running, settings, nothing)  # type: ignore[arg-type]
    for job, ended in (("old", 8.0), ("ending", 8.0), ("recent", 6.0), ("queued", None)):
        store.create(row(job))
        if ended is not None:
            store.move(job, JobState.CANCELLED, "cancelled", NOW - ended * DAY_SECONDS)
        settings.checkpoints_of(job).mkdir(parents=True)
    controller: Any = SimpleNamespace(job="ending", join=lambda seconds: None)
    running.add(controller)  # its processes are still ending
    retention = Retention(store, unused, operations, 7.0)
    assert retention.delete_old(NOW) == ["old"]
    assert not settings.directory_of("old").exists()
    assert [job for job in ("ending", "recent", "queued") if store.exists(job)] == ["ending", "recent", "queued"]
    running.remove("ending")
    assert retention.delete_old(NOW) == ["ending"]


def test_nothing_is_deleted_unless_it_is_said(tmp_path: Path, store: Store) -> None:
    unused: Any = None
    retention = Retention(store, unused, unused, 0.0)
    retention.start()
    retention.stop()
    store.create(row("old"))
    store.move("old", JobState.CANCELLED, "cancelled", 0.0)
    assert store.exists("old")


def test_code_goes_when_no_job_has_it(tmp_path: Path, store: Store) -> None:
    bundles = CodeStore(tmp_path / "code", 1 << 20)
    names = {}
    for kind in ("kept", "gone", "fresh", "asked for"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("task.py", kind)
        names[kind] = bundles.add([buffer.getvalue()])
        assert bundles.unpacked(names[kind]) is not None
    spec = {"task": {"module": "task", "function": "f", "code_bundle": names["kept"]}}
    store.create(replace(row("kept"), spec=json.dumps(spec)))
    unused: Any = None
    retention = Retention(store, bundles, unused, 0.0)
    now = time.time()
    assert retention.delete_code(now) == []
    for path in (tmp_path / "code").glob("*.zip"):
        if path.stem not in names["fresh"]:
            os.utime(path, (0.0, 0.0))
    bundles.read(names["asked for"])
    assert retention.delete_code(now) == [names["gone"]]
    with pytest.raises(SpecError, match="upload the code first"):
        bundles.read(names["gone"])
    left = {path.name for path in (tmp_path / "code" / "unpacked").iterdir()}
    assert left == {names[kind].removeprefix("codeBundles/") for kind in ("kept", "fresh", "asked for")}
    store.delete("kept")
    os.utime(tmp_path / "code" / f"{names['kept'].removeprefix('codeBundles/')}.zip", (0.0, 0.0))
    assert retention.delete_code(now) == [names["kept"]]
