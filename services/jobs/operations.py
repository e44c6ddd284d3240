"""What a user may ask for: create, cancel, pause, resume, scale. The gRPC servicer is a thin layer over this."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterable
from typing import Protocol

from ps.checkpoint.files import MODEL, newest_verified
from ps.job.footprint import explain_refusal, footprint
from ps.parameters.layout import choose_num_servers
from ps.step.messages import Printed
from services.jobs.access import current_caller
from services.jobs.agreement import check_agreement
from services.jobs.code_bundles import CodeStore
from services.jobs.job_log import JobLog
from services.jobs.running import Running
from services.jobs.secret_files import SecretFiles
from services.jobs.task_probe import TaskDescription, TaskProbe
from services.settings import Settings
from services.store.lifecycle import ENDED, JobState, check_verb
from services.store.store import JobRow, Result, Store
from steepest.errors import ChangedError, ConflictError, SpecError, Violation
from steepest.jobs import MAX_PRIORITY, SUBMISSION
from steepest.spec import TrainingJobSpec, spec_from_dict

ENDING_SECONDS = 5.0  # that the processes of a job may take to end when it is to be deleted
_JOB_ID = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


class Capacity(Protocol):
    """What the cluster has in all. Both raise ServiceUnavailableError without one."""

    def totals(self) -> dict[str, float]:
        """Ray's resources, by name."""

    def num_hosts(self) -> int:
        """How many hosts there are."""


class Operations:
    """Checks what users ask, writes it down and passes it on. wake: set when admission has something to look at."""

    def __init__(
        self,
        store: Store,
        bundles: CodeStore,
        probe: TaskProbe,
        capacity: Capacity,
        running: Running,
        settings: Settings,
        wake: threading.Event,
    ) -> None:
        self._store = store
        self._bundles = bundles
        self._probe = probe
        self._capacity = capacity
        self._running = running
        self._settings = settings
        self._wake = wake

    def add_code(self, pieces: Iterable[bytes]) -> str:
        """Store a code bundle and return its name. Raises SpecError."""
        return self._bundles.add(pieces)

    def create(self, job: str, request_id: str, spec: TrainingJobSpec) -> JobRow:
        """Check a job as far as possible without running it, and queue it. Raises SpecError, ConflictError."""
        job = job or f"{_slug(spec.task.function)}-{secrets.token_hex(3)}"
        if not _JOB_ID.fullmatch(job):
            problem = f"{job!r}; allowed: 1 to 63 of a-z, 0-9 and -, a letter first, no - at the end"
            raise SpecError([Violation("training_job_id", problem)])
        if (known := self._store.of_request(request_id)) is not None:
            return known
        if self._store.exists(job):
            raise ConflictError(f"training_job_id: {job!r} is taken; choose another --name")
        owner = current_caller().name
        spec, description, packages = self.rehearse(spec, owner)
        check_agreement(spec, description)
        self._check_device(spec)
        spec = self._place(spec, description)
        new = JobRow(
            id=job,
            request_id=request_id,
            spec=spec.model_dump_json(),
            description=description.to_json(),
            state=JobState.QUEUED,
            reason="created",
            workers=spec.placement.workers,
            incarnation=0,
            total_steps=spec.total_steps(description.num_samples),
            created=time.time(),
            ended=None,
            result=Result(),
            owner=owner,
        )
        notes = [f"packages that go along with the code: {', '.join(packages)}"] if packages else []
        notes += [f"warning: {message}" for _, message in description.warnings]
        row = self._store.create(new, notes, spec.labels)
        if description.printed and row is new:
            log = JobLog(self._settings.log_of(job), self._settings.max_log_bytes)
            log.append(Printed(row.created, "stdout", line, SUBMISSION) for line in description.printed.splitlines())
        self._wake.set()
        return row

    def rehearse(self, spec: TrainingJobSpec, owner: str) -> tuple[TrainingJobSpec, TaskDescription, tuple[str, ...]]:
        """(the spec with what its task settles, what the task is, packages that its code requires). Raises SpecError.

        owner: whose secrets it may name.
        """
        spec, packages = self._with_packages(self._with_rules(self._with_weights(spec)))
        description = self._probe.describe(
            spec,
            self._bundles.unpacked(spec.task.code_bundle),
            self._settings.probe_timeout_seconds,
            SecretFiles(self._settings.secrets_directory).of(spec, owner),
        )
        return description.completed(spec), description, packages

    def _with_weights(self, spec: TrainingJobSpec) -> TrainingJobSpec:
        """The spec with the file of the job that it begins from. Raises SpecError when that has none."""
        if not spec.init_from.startswith("trainingJobs/"):
            return spec
        job = spec.init_from.removeprefix("trainingJobs/")
        written = newest_verified(self._settings.checkpoints_of(job)) if _JOB_ID.fullmatch(job) else None
        if written is None:
            raise SpecError([Violation("init_from", f"{spec.init_from} has no checkpoint here")])
        return spec.model_copy(update={"init_from": str(written.path / MODEL)})

    def _with_packages(self, spec: TrainingJobSpec) -> tuple[TrainingJobSpec, tuple[str, ...]]:
        """(the spec with a code bundle that has the packages it requires, what they are). Raises SpecError."""
        if spec.requirements and not self._settings.allows_requirements:
            problem = "this service takes none (it runs with --no-requirements); have them installed where Ray runs"
            raise SpecError([Violation("requirements", problem)])
        bundle = spec.task.code_bundle
        code, packages = self._bundles.with_packages(bundle, spec.requirements, self._settings.probe_timeout_seconds)
        return spec.model_copy(update={"task": spec.task.model_copy(update={"code_bundle": code})}), packages

    def _with_rules(self, spec: TrainingJobSpec) -> TrainingJobSpec:
        """The spec with what the service's settings say of health rules that it does not name."""
        actions = {**self._settings.health_actions, **spec.health.actions}
        return spec.model_copy(update={"health": spec.health.model_copy(update={"actions": actions})})

    def _check_device(self, spec: TrainingJobSpec) -> None:
        if spec.placement.device == "cuda" and not self._capacity.totals().get("GPU"):
            problem = "'cuda' is not there: no host of the cluster has a GPU; allowed: cpu"
            raise SpecError([Violation("placement.device", problem)])

    def _place(self, spec: TrainingJobSpec, description: TaskDescription) -> TrainingJobSpec:
        """The spec with a number of servers. Raises SpecError for a job that cannot fit the cluster."""
        layout = description.layout(spec)
        num_hosts = self._capacity.num_hosts()
        most = 1 if spec.optimizer.is_full_batch else min(num_hosts, spec.placement.workers)
        servers = spec.placement.servers or choose_num_servers(layout, most)
        spec = spec.model_copy(update={"placement": spec.placement.model_copy(update={"servers": servers})})
        needed = footprint(spec, layout, num_hosts=num_hosts)
        problem = explain_refusal(needed, int(self._capacity.totals().get("memory", 0)))
        if problem:
            raise SpecError([Violation("placement", problem)])
        return spec

    def cancel(self, job: str, etag: str = "") -> JobRow:
        """Stop a job at its next step boundary. Raises ConflictError for one that has ended."""
        return self._steer(job, etag, "cancel", JobState.CANCELLING)

    def pause(self, job: str, etag: str = "") -> JobRow:
        """Hold a running job at its next step boundary. Raises ConflictError in other states."""
        return self._steer(job, etag, "pause", JobState.PAUSING)

    def resume(self, job: str, etag: str = "") -> JobRow:
        """Let a paused job go on. Raises ConflictError in other states."""
        return self._steer(job, etag, "resume", JobState.RUNNING)

    def _steer(self, job: str, etag: str, verb: str, state: JobState) -> JobRow:
        with self._running.lock:
            row = self._seen(job, etag)
            check_verb(row.name, row.state, verb)
            done = {"pause": {JobState.PAUSING, JobState.PAUSED}, "resume": {JobState.RUNNING}}
            if row.state == state or row.state in done.get(verb, ()):
                return row
            controller = self._running.get(job)
            if verb == "resume" and controller is None:
                state = JobState.RECOVERING  # it was paused when the service was restarted, and holds no resources
                self._wake.set()
            row = self._store.move(job, state, f"{verb} requested", time.time())
            if controller is not None:
                controller.ask(verb)
            elif verb == "cancel":
                row = self._store.move(job, JobState.CANCELLED, "cancelled; it had no process running", time.time())
        return row

    def _seen(self, job: str, etag: str) -> JobRow:
        """The job, as the caller saw it; any, if they name no etag. Raises ChangedError."""
        row = self._store.get(job)
        if etag and etag != row.etag:
            problem = f"{row.name} has changed since you saw it: it is {row.state} now, with {row.workers} workers"
            raise ChangedError(f"{problem} and priority {row.priority}; look again, and ask with its new etag")
        return row

    def set_priority(self, job: str, priority: int, etag: str = "") -> JobRow:
        """Have a job wait before or after others. Raises SpecError, ConflictError for one that has ended."""
        if abs(priority) > MAX_PRIORITY:
            raise SpecError([Violation("priority", f"{priority}; allowed: {-MAX_PRIORITY} to {MAX_PRIORITY}")])
        with self._running.lock:
            row = self._seen(job, etag)
            check_verb(row.name, row.state, "priority")
            self._store.update(job, priority=priority)
            self._store.note(job, f"priority changed from {row.priority} to {priority}", time.time())
        self._wake.set()
        return self._store.get(job)

    def delete(self, job: str, etag: str = "") -> None:
        """Forget a job that has ended, and all that is kept of it. Raises NotFoundError, ConflictError."""
        ending = self._running.get(job)
        if ending is not None and self._seen(job, etag).state in ENDED:
            ending.join(ENDING_SECONDS)  # outside the lock, which it takes
        with self._running.lock:
            row = self._seen(job, etag)
            check_verb(row.name, row.state, "delete")
            if self._running.get(job) is not None:
                raise ConflictError(f"{row.name} is {row.state}, and its processes are still ending; try again")
            self._store.delete(job)
        shutil.rmtree(self._settings.directory_of(job), ignore_errors=True)

    def scale(self, job: str, workers: int, etag: str = "") -> JobRow:
        """Change the number of workers of a live job. Raises SpecError, ConflictError."""
        with self._running.lock:
            row = self._seen(job, etag)
            check_verb(row.name, row.state, "scale")
            spec = json.loads(row.spec)
            placement = spec["placement"]
            least = placement.get("min_workers")
            placement |= {"workers": workers, "min_workers": least and min(least, workers)}
            micro_batches = spec_from_dict(spec).data.num_micro_batches
            self._store.update(job, workers=workers)
            idle = workers - micro_batches
            note = f"; a step has {micro_batches} micro-batches, so {idle} will have nothing to do" if idle > 0 else ""
            self._store.note(job, f"scaling from {row.workers} to {workers} workers{note}", time.time())
            controller = self._running.get(job)
            if controller is not None:
                controller.most = workers
                if least is None or workers < controller.target:  # else an elastic job grows when there is room
                    controller.ask("scale", workers)
        self._wake.set()
        return self._store.get(job)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "job"
