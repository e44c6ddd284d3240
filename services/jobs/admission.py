"""Starts waiting jobs, first come, first served, as room appears; takes over what an earlier service left."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Protocol

from services.cluster.kept_life import KeptLife
from services.jobs.code_bundles import CodeStore
from services.jobs.controller import Controller
from services.jobs.life import Assignment
from services.jobs.room import Room
from services.jobs.running import Running
from services.jobs.task_probe import TaskDescription
from services.settings import Settings
from services.store.lifecycle import ENDED, JobState
from services.store.store import JobRow, Store
from steepest.errors import NotFoundError, ServiceUnavailableError
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

    def reserve(self, job: str, spec: TrainingJobSpec, num_workers: int, layout_bytes: int, code: bytes) -> Room | None:
        """Room for all servers and workers of a job, or None when there is none now."""

    def kept(self) -> Sequence[str]:
        """Jobs that went on without a service."""

    def adopt(self, job: str) -> tuple[Room, KeptLife] | None:
        """One of them, with its life; None, and its room is given back, when that is not whole."""

    def give_back(self, job: str) -> None:
        """Let go of the room of one of them."""


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
        """Go on with jobs that went on, take over the rest of what was live, then admit until `stop`."""
        adopted = self._adopt_all()
        take_over(self._store, time.time(), adopted)
        self._thread.start()

    def _adopt_all(self) -> set[str]:
        """The jobs that this service goes on with, as their processes have."""
        adopted = set()
        try:
            for job in self._landlord.kept():
                if self._adopt(job):
                    adopted.add(job)
        except ServiceUnavailableError as error:  # jobs that wait for room say so
            log.info("no job is gone on with: %s", error)
        except Exception:
            log.exception("jobs that went on without a service")
        return adopted

    def _adopt(self, job: str) -> bool:
        try:
            row = self._store.get(job)
        except NotFoundError:
            row = None
        if row is None or row.state in ENDED or row.state == JobState.QUEUED:
            self._landlord.give_back(job)
            return False
        found = self._landlord.adopt(job)
        if found is None:
            return False
        room, kept = found
        if kept.config.incarnation != row.incarnation:
            room.release()
            return False
        self._store.note(job, "a service is back; the job has gone on meanwhile", time.time())
        self._run_job(self._assignment(row), room, kept)
        return True

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
        job = self._assignment(row)
        users = [controller.job_name for controller in self._running.all()]
        reason = self._landlord.shortage(job.spec.placement, row.workers, users)
        if reason:
            return reason
        layout_bytes = 8 * sum(p.numel for p in job.description.model.parameters)
        try:
            room = self._landlord.reserve(row.id, job.spec, row.workers, layout_bytes, job.code)
        except ServiceUnavailableError as error:
            return str(error)
        if room is None:
            return _no_room(job.spec.placement)
        with self._running.lock, contextlib.ExitStack() as stack:
            stack.callback(room.release)  # if the database is away, or the job was cancelled meanwhile
            row = self._store.get(row.id)
            if row.state in ENDED:
                return ""
            if row.state == JobState.QUEUED:
                self._store.move(row.id, JobState.STARTING, "starting servers and workers", time.time())
            self._run_job(replace(job, row=row), room)
            stack.pop_all()
        return ""

    def _assignment(self, row: JobRow) -> Assignment:
        spec = spec_from_dict(json.loads(row.spec))
        code = self._bundles.read(spec.task.code_bundle)
        return Assignment(row, spec, TaskDescription.from_json(row.description), code)

    def _run_job(self, job: Assignment, room: Room, kept: KeptLife | None = None) -> None:
        controller = Controller(job, self._store, self._settings, room, self._on_end, kept=kept)
        self._running.add(controller)
        controller.start()

    def _on_end(self, job: str) -> None:
        self._running.remove(job)
        self._wake.set()


def take_over(store: Store, now: float, adopted: Collection[str] = ()) -> None:
    """Jobs that were live when the last service stopped go on from their last checkpoint, or end as users asked."""
    live = set(JobState) - ENDED - {JobState.QUEUED, JobState.PAUSED, JobState.RECOVERING}
    for row in store.in_states(live):
        if row.id in adopted:
            continue
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
