"""Brings one job to its end: starts its servers and workers, replaces what dies, and carries out what users ask.

One thread, one inbox: reports of the leader, ends of actors and commands of users are handled one at a time.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue

from ps.checkpoint.files import newest_valid, read_records
from ps.job.config import JobConfig
from ps.step.effects import Phase
from ps.step.messages import StepRecord
from ps.wire.address import ServerAddress
from services.cluster.cluster import Exit, Placement, Started
from services.jobs.histogram import Histogram
from services.jobs.leader_client import CheckpointReport, PhaseReport, Report, Supervision
from services.jobs.task_probe import TaskDescription
from services.settings import Settings
from services.store.lifecycle import ENDED, JobState
from services.store.store import JobRow, Store
from steepest.errors import ConflictError
from steepest.spec import TrainingJobSpec

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
PERSIST_SECONDS = 1.0
ANY_LIFE = -1  # instead of an incarnation: the action outlives it


@dataclass
class _Worker:
    generation: int = 0
    started: Started | None = None
    state: str = "starting"


@dataclass
class Totals:
    """What the exporter counts over the life of a controller."""

    steps: int = 0
    samples: int = 0
    clipped: int = 0
    skipped: int = 0
    replaced_workers: int = 0
    step_seconds: Histogram = field(default_factory=Histogram)

    def count(self, records: list[StepRecord]) -> None:
        """Add what these steps did."""
        self.steps += len(records)
        self.samples += sum(r.samples for r in records)
        self.clipped += sum(r.clipped for r in records)
        self.skipped += sum(r.skipped for r in records)
        for record in records:
            self.step_seconds.observe(record.step_seconds)


class Controller(threading.Thread):
    """One job that holds resources. on_end is called when it holds none any more."""

    def __init__(
        self,
        row: JobRow,
        spec: TrainingJobSpec,
        description: TaskDescription,
        code: bytes,
        store: Store,
        settings: Settings,
        placement: Placement,
        on_end: Callable[[str], None],
    ) -> None:
        super().__init__(name=f"controller-{row.id}", daemon=True)
        self.job = row.id
        self.job_name = row.name
        self.spec = spec
        self.result = row.result
        self.record: StepRecord | None = None
        self.totals = Totals()
        self.total_steps = row.total_steps
        self._description = description
        self._code = code
        self._store = store
        self._settings = settings
        self._placement = placement
        self._on_end = on_end
        self._wanted = row.workers
        self._incarnation = row.incarnation
        self._inbox: SimpleQueue[tuple[int, Callable[[], None]]] = SimpleQueue()
        self._workers: dict[str, _Worker] = {}
        self._servers: list[Started] = []
        self._addresses: list[ServerAddress] = []
        self._supervision: Supervision | None = None
        self._config: JobConfig | None = None
        self._lost = ""  # why this life is over, when a server died
        self._deaths = 0  # without progress
        self._step_of_death = -1
        self._pause_wanted = False
        self._cancel_deadline: float | None = None
        self._persisted = 0.0
        self._generations = itertools.count()

    # -- asked from outside -----------------------------------------------------------------------------------------

    def ask(self, verb: str, workers: int = 0) -> None:
        """Have a verb carried out: pause, resume, cancel, scale."""
        self._inbox.put((ANY_LIFE, lambda: self._obey(verb, workers)))

    def _in_this_life(self) -> Callable[[Callable[[], None]], None]:
        """What queues an action, which is dropped when the present life of the job is over by then."""
        incarnation = self._incarnation
        return lambda action: self._inbox.put((incarnation, action))

    # -- life -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Live until the job has ended."""
        try:
            self._placement.set_code(self._code)
            while not self._is_ended() and self._live():
                pass
        except Exception as error:
            log.exception("controller of %s", self.job_name)
            self._end(JobState.FAILED, "the controller failed", f"internal error: {error!r}")
        finally:
            self._hang_up()
            self._placement.release()
            self._on_end(self.job)

    def _is_ended(self) -> bool:
        return self._store.get(self.job).state in ENDED

    def _live(self) -> bool:
        """One life (incarnation) of the job. Returns whether there is to be another."""
        self._incarnation += 1
        self._lost = ""
        self._store.update(self.job, incarnation=self._incarnation)
        restored = newest_valid(self._settings.checkpoints_of(self.job))
        step = 0
        if restored is not None:
            written = restored[0]
            step = written.step
            self.result = replace(
                self.result, parameters_sha256=written.parameters_sha256, state_sha256=written.state_sha256
            )
            # What the leader of the life before had no time to tell.
            self._store.fill_history(self.job, *read_records(written.path))
        del restored
        self._store.rewind(self.job, step)
        self._set_step(step)
        placement = self.spec.placement
        self._config = JobConfig(
            job=self.job,
            incarnation=self._incarnation,
            token=secrets.token_urlsafe(32),
            spec=self.spec,
            model=self._description.model,
            num_samples=self._description.num_samples,
            num_evaluation_samples=self._description.num_evaluation_samples,
            metric_names=self._description.metric_names,
            num_servers=placement.num_servers,
            checkpoint_directory=self._settings.checkpoints_of(self.job),
        )
        post = self._in_this_life()
        try:
            started = self._placement.start_servers(
                self._config, lambda i, end: post(lambda: self._server_ended(i, end))
            )
        except Exception as error:
            return self._recover(f"the servers did not start: {error}")
        self._addresses = [address for address, _ in started]
        self._servers = [where for _, where in started]
        self._supervision = Supervision(
            self._addresses[0].control, self._config, lambda report: post(lambda: self._on_report(report))
        )
        self._workers = {}
        if self._pause_wanted:
            self._supervision.send("pause")
        self._match_workers()
        while not self._lost and not self._is_over():
            self._handle_next()
        return self._recover(self._lost) if self._lost else False

    def _handle_next(self) -> None:
        try:
            incarnation, action = self._inbox.get(timeout=POLL_SECONDS)
        except Empty:
            return
        if incarnation in (ANY_LIFE, self._incarnation):
            action()

    def _is_over(self) -> bool:
        if self._cancel_deadline is not None and time.time() > self._cancel_deadline:
            seconds = self._settings.cancel_grace_seconds
            self._end(JobState.CANCELLED, f"cancelled; no step ended within {seconds:g} s, so the last one is lost")
        return self._is_ended()

    def _recover(self, reason: str) -> bool:
        """A server died: start again from the last checkpoint, unless that happened too often without progress."""
        self._hang_up()
        self._placement.stop_actors()
        if self._cancel_deadline is not None:
            self._end(JobState.CANCELLED, "cancelled")
            return False
        if self._count_death():
            self._end(JobState.FAILED, "its servers keep dying", f"{reason} ({self._deaths} deaths without progress)")
            return False
        self._move(JobState.RECOVERING, f"{reason}; going back to the last checkpoint")
        return True

    def _hang_up(self) -> None:
        if self._supervision is not None:
            self._supervision.close()
            self._supervision = None

    def _count_death(self) -> bool:
        """Count a death; whether there were too many since the last progress."""
        if self.result.step > self._step_of_death:
            self._deaths = 0
        self._step_of_death = max(self._step_of_death, self.result.step)
        self._deaths += 1
        return self._deaths > self.spec.placement.max_worker_restarts

    # -- commands ---------------------------------------------------------------------------------------------------

    def _obey(self, verb: str, workers: int) -> None:
        if verb == "scale":
            self._wanted = workers
            if self._supervision is not None:
                self._match_workers()
            return
        if verb == "cancel":
            state = self._store.get(self.job).state
            if self._supervision is None or not any(w.state == "running" for w in self._workers.values()):
                self._end(
                    JobState.CANCELLED, "cancelled" if state == JobState.CANCELLING else "cancelled while starting"
                )
                return
            self._cancel_deadline = time.time() + self._settings.cancel_grace_seconds
        else:
            self._pause_wanted = verb == "pause"
        if self._supervision is not None:
            self._supervision.send(verb)

    # -- workers ----------------------------------------------------------------------------------------------------

    def _match_workers(self) -> None:
        """Start or retire workers until there are as many as wanted."""
        staying = [name for name, w in self._workers.items() if w.state != "retiring"]
        staying.sort(key=self._placement.has_server, reverse=True)  # who shares its GPU with a server goes last
        for name in reversed(staying[self._wanted :]):
            self._retire(name)
        number = 0
        for _ in range(self._wanted - len(staying)):
            while f"worker-{number}" in self._workers:
                number += 1
            self._start_worker(f"worker-{number}")

    def _start_worker(self, name: str) -> None:
        assert self._config is not None  # noqa: S101  # only called in a life
        generation = next(self._generations)
        self._workers[name] = _Worker(generation)
        post = self._in_this_life()
        self._placement.start_worker(
            self._config,
            name,
            generation,
            self._addresses,
            lambda started: post(lambda: self._worker_started(name, generation, started)),
            lambda end: post(lambda: self._worker_ended(name, generation, end)),
        )
        self._publish()

    def _retire(self, name: str) -> None:
        worker = self._workers[name]
        if worker.state == "running" and self._supervision is not None:
            worker.state = "retiring"
            self._supervision.send("retire", name)
            return
        del self._workers[name]
        self._placement.stop_worker(name, keep_room=False)

    def _worker_started(self, name: str, generation: int, started: Started) -> None:
        worker = self._workers.get(name)
        if worker is not None and worker.generation == generation:
            worker.started = started
            self._publish()

    def _worker_ended(self, name: str, generation: int, end: Exit) -> None:
        worker = self._workers.get(name)
        if worker is None or worker.generation != generation or self._is_ended():
            return
        del self._workers[name]
        if end.kind == "refused":
            error = f"{end.message}\n{end.traceback}".strip()
            self._end(JobState.FAILED, f"the task cannot be run on {name}", error)
            return
        if worker.state == "retiring":
            self._placement.stop_worker(name, keep_room=False)
            self._publish()
            return
        if end.kind == "done":
            return  # dismissed at the end of the job, which the leader reports
        self._placement.stop_worker(name, keep_room=True)
        if self._count_death():
            self._end(
                JobState.FAILED,
                f"{name} keeps dying",
                f"{name} died at step {self.result.step}: {end.message} ({self._deaths} deaths without progress; "
                f"placement.max_worker_restarts = {self.spec.placement.max_worker_restarts})",
            )
            return
        self.totals.replaced_workers += 1
        self._store.note(self.job, f"{name} died and is replaced: {end.message}", time.time())
        self._start_worker(name)

    def _name_of(self, server: int) -> str:
        """Those beyond the number of shards are homes of their hosts only."""
        shards = self.spec.placement.num_servers
        return f"server-{server}" if server < shards else f"home-{server - shards}"

    def _server_ended(self, index: int, end: Exit) -> None:
        self._lost = f"{self._name_of(index)} died: {end.message}"

    # -- reports of the leader --------------------------------------------------------------------------------------

    def _on_report(self, report: Report) -> None:
        self._on_records(report.records, report.newest)
        for _, metrics in report.evaluations:
            self.result = replace(self.result, metrics=metrics)
        for checkpoint in report.checkpoints:
            self._on_checkpoint(checkpoint)
        for worker, change in report.members:
            self._on_member(worker, change)
        for phase in report.phases:
            self._on_phase(phase)
        if time.time() - self._persisted > PERSIST_SECONDS or report.members or report.evaluations or report.phases:
            self._publish()

    def _on_records(self, records: list[StepRecord], newest: StepRecord | None) -> None:
        if records:
            self._store.append_history(self.job, self._incarnation, records)
            if self._supervision is not None:
                self._supervision.acknowledge(records[-1].step)
        if newest is None:
            return
        self.record = newest
        self.totals.count(records or [newest])
        self._set_step(newest.step + 1)
        self.result = replace(self.result, loss=newest.loss)

    def _on_checkpoint(self, checkpoint: CheckpointReport) -> None:
        if checkpoint.problem:
            self._store.note(self.job, checkpoint.problem, time.time())
            return
        self.result = replace(
            self.result, parameters_sha256=checkpoint.parameters_sha256, state_sha256=checkpoint.state_sha256
        )

    def _on_member(self, name: str, change: str) -> None:
        worker = self._workers.get(name)
        if worker is None:
            return
        if change == "joined" and worker.state == "starting":
            worker.state = "running"
            if len(self._workers) > self._wanted:
                self._match_workers()
        elif change == "hung":
            seconds = self.spec.placement.worker_timeout_seconds
            self._placement.stop_worker(name, keep_room=True)
            message = f"it did not answer within {seconds:g} s (placement.worker_timeout_seconds)"
            self._worker_ended(name, worker.generation, Exit("died", message))

    def _on_phase(self, phase: PhaseReport) -> None:
        state = self._store.get(self.job).state
        match phase.phase:
            case Phase.WORKING:
                if state in (JobState.STARTING, JobState.RECOVERING, JobState.PAUSED):
                    self._move(JobState.RUNNING, phase.reason)
                if self._pause_wanted and state == JobState.RECOVERING:
                    self._move(JobState.PAUSING, "to be paused again")
            case Phase.PAUSED:
                if state == JobState.RUNNING and self._pause_wanted:
                    self._move(JobState.PAUSING, "to be paused again")
                    state = JobState.PAUSING
                if state == JobState.PAUSING:
                    self._move(JobState.PAUSED, phase.reason)
            case Phase.FINISHED:
                self._end(JobState.SUCCEEDED, phase.reason)
            case Phase.CANCELLED:
                self._end(JobState.CANCELLED, phase.reason)
            case Phase.FAILED:
                traceback = phase.failure.traceback if phase.failure is not None else ""
                self._end(JobState.FAILED, phase.reason, f"{phase.reason}\n{traceback}".strip())

    # -- the store --------------------------------------------------------------------------------------------------

    def _set_step(self, step: int) -> None:
        per_epoch = -(-self._description.num_samples // self.spec.data.global_batch)
        epochs, rest = divmod(step, per_epoch)
        in_epoch = min(rest * self.spec.data.global_batch, self._description.num_samples)
        self.result = replace(self.result, step=step, samples=epochs * self._description.num_samples + in_epoch)

    def _publish(self) -> None:
        """Write what is known to the store."""
        members = [("server", self._name_of(i), s.pid, s.host, "running") for i, s in enumerate(self._servers)]
        for name, worker in self._workers.items():
            started = worker.started or Started(0, "")
            members.append(("worker", name, started.pid, started.host, worker.state))
        self.result = replace(self.result, members=tuple(members))
        self._store.update(self.job, result=self.result)
        self._persisted = time.time()

    def _move(self, state: JobState, reason: str) -> None:
        """Change the state, unless a user's cancel came first."""
        try:
            self._store.move(self.job, state, reason, time.time())
        except ConflictError:
            log.info("%s cannot become %s", self.job_name, state)

    def _end(self, state: JobState, reason: str, error: str = "") -> None:
        self.result = replace(self.result, error=error)
        self._publish()
        if state == JobState.CANCELLED:
            self._move(JobState.CANCELLING, reason)
        self._move(state, reason)
