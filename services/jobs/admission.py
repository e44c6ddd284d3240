"""Starts waiting jobs as room appears, and has others make room; takes over what an earlier service left.

`services.jobs.scheduling` decides; this module asks the cluster and the controllers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Protocol

from services.cluster.demand import demand
from services.cluster.kept_life import KeptLife
from services.jobs import scheduling
from services.jobs.code_bundles import CodeStore
from services.jobs.controller import Controller
from services.jobs.life import Assignment
from services.jobs.room import Room
from services.jobs.running import Running
from services.jobs.scheduling import Holder, Resize, Wish
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

    def free(self) -> dict[str, float]:
        """Resources that nothing uses."""

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
        own = self._assignment(row)
        if _least(own.spec.placement, row.workers) <= len(kept.workers) < row.workers:
            own = replace(own, workers=len(kept.workers))  # it grows when there is room
        self._run_job(own, room, kept)
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
        while waiting:
            held = self._held_by_owner()
            waiting.sort(key=lambda row: (-row.priority, held[row.owner], row.created, row.id))  # used at once
            started = None
            for row in waiting:
                reason = f"waiting behind {blocked}" if blocked else self._try_to_start(row)
                if not reason:
                    started = row
                    break
                blocked = blocked or row.name
                if reason != row.reason:
                    self._say(row, reason)
            if started is None:
                return
            waiting.remove(started)
        able = any(controller.target < controller.most for controller in self._running.all())
        resize = scheduling.grow(self._holders(), self._landlord.free()) if able else None
        if resize is not None:
            self._resize(resize, "there is room, and nobody waits")

    def _held_by_owner(self) -> Counter[str]:
        """How many CPUs the jobs of each owner hold."""
        held = Counter[str]()
        for controller in self._running.all():
            placement = controller.spec.placement
            held[controller.assignment.row.owner] += placement.threads_per_worker * controller.target
        return held

    def _holders(self) -> list[Holder]:
        """The jobs that hold resources."""
        controllers = self._running.all()
        rows = {row.id: row for row in self._store.in_states(set(JobState) - ENDED - {JobState.QUEUED})}
        return [_holder(each, rows[each.job]) for each in controllers if each.job in rows]

    def _resize(self, resize: Resize, why: str) -> None:
        controller = self._running.get(resize.job)
        if controller is not None:
            count = f"{resize.workers} worker{'s' if resize.workers != 1 else ''}"
            self._store.note(resize.job, f"{count} instead of {controller.target}: {why}", time.time())
            controller.ask("scale", resize.workers)

    def _make_room(self, row: JobRow, wish: Wish) -> None:
        """Have others give room to a job that waits."""
        holding, free = self._holders(), self._landlord.free()
        for action in scheduling.make_room(wish, holding, free, preempts=self._settings.preemption):
            whom = f"{row.name}, which has priority {row.priority}"
            controller = self._running.get(action.job)
            if isinstance(action, Resize):
                self._resize(action, f"to make room for {whom}")
            elif controller is not None:
                controller.vacate(whom)

    def _say(self, row: JobRow, reason: str) -> None:
        with self._running.lock:
            if self._store.get(row.id).state == row.state:
                self._store.move(row.id, row.state, reason, time.time())

    def _try_to_start(self, row: JobRow) -> str:
        """Start a job, or say what it waits for."""
        job = self._assignment(row)
        placement = job.spec.placement
        wish = Wish(row.id, row.priority, demand(placement, 1), _least(placement, row.workers), row.workers)
        users = [controller.job_name for controller in self._running.all()]
        reason, workers = self._landlord.shortage(placement, row.workers, users), row.workers
        if reason and wish.least < wish.most:
            workers = scheduling.fitting(wish, self._landlord.free())
            reason = "" if workers else self._landlord.shortage(placement, wish.least, users)
        if reason:
            self._make_room(row, wish)
            return reason
        layout_bytes = 8 * sum(p.numel for p in job.description.model.parameters)
        try:
            room = self._landlord.reserve(row.id, job.spec, workers, layout_bytes, job.code)
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
            if wish.least < wish.most and workers < row.workers:
                self._store.note(row.id, f"begins with {workers} of {row.workers} workers", time.time())
                job = replace(job, workers=workers)
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
        with self._running.lock:
            self._running.remove(job)
            try:
                if not self._stopping.is_set():  # what was asked of it when it no longer listened
                    _leave_behind(self._store, self._store.get(job), "its processes had ended", time.time())
            except NotFoundError:  # it was deleted
                pass
            except Exception:
                log.exception("the end of %s", job)
        self._wake.set()


def take_over(store: Store, now: float, adopted: Collection[str] = ()) -> None:
    """Jobs that were live when the last service stopped go on from their last checkpoint, or end as users asked."""
    live = set(JobState) - ENDED - {JobState.QUEUED, JobState.PAUSED, JobState.RECOVERING}
    for row in store.in_states(live):
        if row.id not in adopted:
            _leave_behind(store, row, "the service was restarted", now)


def _leave_behind(store: Store, row: JobRow, what_happened: str, now: float) -> None:
    """Nobody runs a job any more: it waits, or ends as users asked."""
    match row.state:
        case JobState.PAUSING:
            store.move(row.id, JobState.PAUSED, f"paused; {what_happened} meanwhile", now)
        case JobState.CANCELLING:
            store.move(row.id, JobState.CANCELLED, f"cancelled; {what_happened} meanwhile", now)
        case JobState.STARTING | JobState.RUNNING:
            store.move(row.id, JobState.RECOVERING, what_happened, now)


def _least(placement: PlacementSpec, workers: int) -> int:
    """With how few workers a job may run. workers: how many it is to have."""
    return min(placement.min_workers or workers, workers)


def _holder(controller: Controller, row: JobRow) -> Holder:
    placement, team = controller.spec.placement, controller.team
    is_settled = row.state == JobState.RUNNING and team.is_settled and team.wanted == controller.target
    return Holder(
        row.id,
        row.priority,
        row.created,
        demand(placement, 1),
        _least(placement, controller.most),
        controller.most,
        controller.target,
        len(team),
        is_settled,
        leaves=bool(controller.room_for),
    )


def _no_room(placement: PlacementSpec) -> str:
    """Why a job waits though the cluster as a whole has enough."""
    threads = placement.threads_per_worker
    if threads > 1:
        return (
            f"waiting for room: each worker needs {threads} CPUs on one node, and the free ones are spread too thin, "
            "or a node with room has too little memory"
        )
    return "waiting for room: the nodes with free CPUs have too little memory for the job's servers"
