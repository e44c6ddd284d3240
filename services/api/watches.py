"""Streams that stay open: those who watch the same job are served by one reading of it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from ps.wire import convert as ps_convert
from services.api.convert import event_to_proto
from services.jobs.task_probe import TaskDescription
from services.settings import Settings
from services.store.history import JobHistory
from services.store.store import JobRow, Store
from steepest.errors import ServiceUnavailableError
from steepest.v1 import training_jobs_pb2 as pb

MAX_STREAMS = 1500  # each holds a thread of the server
LOOK_SECONDS = 0.1
STREAMS_A_LOOK = 100  # from so many on, each looks half as often, and so on


class Watched:
    """One job, as those who watch it see it. Safe to use from many threads."""

    def __init__(self, store: Store, history: JobHistory, job: str) -> None:
        self._store = store
        self._history = history
        self._job = job
        self._lock = threading.Lock()
        self._looked = 0.0
        self.row: JobRow = store.get(job)
        self._logged = TaskDescription.from_json(self.row.description).logged_names
        self.progress: pb.WatchTrainingJobResponse | None = None  # of the newest step
        self.events: list[pb.WatchTrainingJobResponse] = []  # all, in order: number n has sequence n + 1
        self.watchers = 0

    def look(self, seconds: float) -> None:
        """Read what is new, unless that was done in so many seconds."""
        with self._lock:
            if time.monotonic() - self._looked < seconds:
                return
            # The order matters: a job read as ended here has all its events and records in the store already.
            row = self._store.get(self._job)
            record = self._history.last()
            known = None if self.progress is None else self.progress.progress.step
            if record is not None and record.step != known:
                progress = ps_convert.record_to_proto(record, self._logged)
                self.progress = pb.WatchTrainingJobResponse(progress=progress)
            for event in self._store.events_after(self._job, len(self.events)):
                self.events.append(pb.WatchTrainingJobResponse(event=event_to_proto(event)))
            self.row = row
            self._looked = time.monotonic()


class Watches:
    """All open streams of a service."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._lock = threading.Lock()
        self._watched: dict[str, Watched] = {}
        self._num_open = 0

    @property
    def pause(self) -> float:
        """Seconds between two looks of a stream, so that many cost the service no more than a part of a core."""
        return LOOK_SECONDS * (1 + self._num_open // STREAMS_A_LOOK)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """A stream is open meanwhile. Raises ServiceUnavailableError when there are too many."""
        with self._lock:
            if self._num_open >= MAX_STREAMS:
                raise ServiceUnavailableError(f"{MAX_STREAMS} streams are open here; try again when some have ended")
            self._num_open += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_open -= 1

    @contextlib.contextmanager
    def of(self, job: str) -> Iterator[Watched]:
        """A job that is watched meanwhile. Raises NotFoundError, and as `opened`."""
        with self.opened():
            made = Watched(self._store, JobHistory(self._settings.history_of(job)), job)
            with self._lock:
                watched = self._watched.setdefault(job, made)
                watched.watchers += 1
            try:
                yield watched
            finally:
                with self._lock:
                    watched.watchers -= 1
                    if not watched.watchers and self._watched.get(job) is watched:
                        del self._watched[job]
