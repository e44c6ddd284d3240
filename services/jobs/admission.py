"""Starts waiting jobs, first come, first served, as room appears; takes over what an earlier service left."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from services.jobs.code_bundles import CodeStore
from services.jobs.controller import Assignment, Controller
from services.jobs.room import Room
from services.jobs.running import Running
from services.jobs.task_probe import TaskDescription
from services.settings import Settings
from services.store.lifecycle import ENDED, JobState
from services.store.store import JobRow, Store
from steepest.errors import ServiceUnavailableError
from steepest.spec import PlacementSpec, TrainingJobSpec, spec_from_dict

log = logging.getLogger(__name__)

ADMIT_SECONDS = 0.5
DETACH_SECONDS = 10.0
WAITING = frozenset({JobState.QUEUED, JobState.RECOVERING})


class Landlord(Protocol):
    """Who gives jobs room: the cluster. All raise ServiceUnavailableError without one."""

    def wait_ready(self) -> None:
        """Return when the cluster is there."""

    def shortage(self, placement: PlacementSpec, num_workers: int, users: Sequence[str]) -> str:
        """What a job would have to wait for, or nothing. users: names of the jobs that hold resources."""

    def reserve(self, spec: TrainingJobSpec, num_workers: int, layout_bytes: int) -> Room | None:
        """Room for all servers and workers of a job, or None when there is none now."""


class Admission:
    """One thread that admits jobs. wake: set when there may be something to do."""

    def __init__(
        self,
        store: Store,
        bundles: CodeStore,
        landlord: Landlord,
        running: Running,
        settings: Settings,
        wake: threading.Event,
    ) -> None:
        self._store = store
        self._bundles = bundles
        self._landlord = landlord
        self._running = running
        self._settings = settings
        self._wake = wake
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="admission", daemon=True)

    def start(self) -> None:
        """Take over what was live, then admit until `stop`."""
        take_over(self._store, time.time())
        self._thread.start()

    def stop(self) -> None:
        """Admit no more, and have every running job left as it is."""
        self._stopping.set()
        self._wake.set()
        self._thread.join()
        controllers = self._running.all()
        for controller in controllers:
            controller.detach()
        for controller in controllers:
            controller.join(DETACH_SECONDS)

    def _run(self) -> None:
        try:
            self._landlord.wait_ready()
        except ServiceUnavailableError as error:
            for row in self._store.in_states(WAITING):
                self._store.note(row.id, str(error), time.time())
        while not self._stopping.is_set():
            try:
                self._admit()
            except Exception:
                log.exception("admission")
            self._wake.wait(ADMIT_SECONDS)
            self._wake.clear()

    def _admit(self) -> None:
        waiting = [row for row in self._store.in_states(WAITING) if row.id not in self._running]
        blocked = ""
        for row in waiting:
            reason = f"waiting behind {blocked}" if blocked else self._try_to_start(row)
            if reason:
                blocked = blocked or row.name
                if reason != row.reason:
                    self._say(row, reason)

    def _say(self, row: JobRow, reason: str) -> None:
        with self._running.lock:
            if self._store.get(row.id).state == row.state:
                self._store.move(row.id, row.state, reason, time.time())

    def _try_to_start(self, row: JobRow) -> str:
        """Start a job, or say what it waits for."""
        spec = spec_from_dict(json.loads(row.spec))
        users = [controller.job_name for controller in self._running.all()]
        reason = self._landlord.shortage(spec.placement, row.workers, users)
        if reason:
            return reason
        description = TaskDescription.from_json(row.description)
        layout_bytes = 8 * sum(p.numel for p in description.model.parameters)
        code = self._bundles.read(spec.task.code_bundle)
        room = self._landlord.reserve(spec, row.workers, layout_bytes)
        if room is None:
            return _no_room(spec.placement)
        with self._running.lock, contextlib.ExitStack() as stack:
            stack.callback(room.release)  # if the database is away, or the job was cancelled meanwhile
            row = self._store.get(row.id)
            if row.state in ENDED:
                return ""
            if row.state == JobState.QUEUED:
                self._store.move(row.id, JobState.STARTING, "starting servers and workers", time.time())
            job = Assignment(row, spec, description, code)
            controller = Controller(job, self._store, self._settings, room, self._on_end)
            self._running.add(controller)
            stack.pop_all()
        controller.start()
        return ""

    def _on_end(self, job: str) -> None:
        self._running.remove(job)
        self._wake.set()


def take_over(store: Store, now: float) -> None:
    """Jobs that were live when the last service stopped go on from their last checkpoint, or end as users asked."""
    live = set(JobState) - ENDED - {JobState.QUEUED, JobState.PAUSED, JobState.RECOVERING}
    for row in store.in_states(live):
        match row.state:
            case JobState.PAUSING:
                store.move(row.id, JobState.PAUSED, "paused; the service was restarted meanwhile", now)
            case JobState.CANCELLING:
                store.move(row.id, JobState.CANCELLED, "cancelled; the service was restarted meanwhile", now)
            case _:
                store.move(row.id, JobState.RECOVERING, "the service was restarted", now)


def _no_room(placement: PlacementSpec) -> str:
    """Why a job waits though the cluster as a whole has enough."""
    threads = placement.threads_per_worker
    if threads > 1:
        return (
            f"waiting for room: each worker needs {threads} CPUs on one node, and the free ones are spread too thin, "
            "or a node with room has too little memory"
        )
    return "waiting for room: the nodes with free CPUs have too little memory for the job's servers"
