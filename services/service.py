"""The whole service: wires the store, the scheduler, controllers, the gRPC and the HTTP port."""

from __future__ import annotations

import fcntl
import json
import logging
import re
import secrets
import threading
import time
from concurrent import futures
from pathlib import Path
from typing import IO

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client.registry import CollectorRegistry

from ps.compression.choose import compression_problem
from ps.job.footprint import explain_refusal, footprint
from ps.parameters.layout import choose_num_servers
from services.api.errors import ErrorInterceptor
from services.api.servicer import TrainingJobServicer
from services.cluster.cluster import Scheduler
from services.jobs.code_bundles import CodeStore
from services.jobs.controller import Controller
from services.jobs.task_probe import TaskDescription, probe_task
from services.settings import Settings
from services.store.lifecycle import ENDED, JobState, check_verb
from services.store.store import JobRow, Result, Store
from services.telemetry.http import HttpServer
from services.telemetry.metrics import JobCollector
from steepest.errors import ConflictError, ServiceUnavailableError, SpecError, Violation
from steepest.spec import TrainingJobSpec, spec_from_dict
from steepest.v1 import training_jobs_pb2 as pb
from steepest.v1 import training_jobs_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

ADMIT_SECONDS = 0.5
MAX_CALLS = 256
_JOB_ID = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


class Service:
    """Runs from construction to `stop`. Raises OSError when a port is taken."""

    def __init__(self, settings: Settings) -> None:
        settings.data_directory.mkdir(parents=True, exist_ok=True)
        self._lock_file = _lock(settings.data_directory)
        self.settings = settings
        self.closing = threading.Event()
        self.scheduler = Scheduler(settings)
        registry = CollectorRegistry()
        self._http = HttpServer(settings.http_host, settings.http_port, registry, lambda: not self.closing.is_set())
        try:
            self._grpc, self.grpc_port = self._bind()
        except BaseException:
            self._http.stop()
            raise
        self.http_port = self._http.port
        self.scheduler.start()
        self.store = Store(settings.database_url)
        self.code = CodeStore(settings.data_directory / "code", settings.max_code_bytes)
        self._lock = threading.Lock()
        self._controllers: dict[str, Controller] = {}
        self._wake = threading.Event()
        self._take_over()
        registry.register(JobCollector(self.controllers, self._count_states))
        self._admission = threading.Thread(target=self._admit, name="admission", daemon=True)
        self._admission.start()
        self._grpc.start()

    def _bind(self) -> tuple[grpc.Server, int]:
        server = grpc.server(
            futures.ThreadPoolExecutor(MAX_CALLS),
            interceptors=[ErrorInterceptor()],
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 16 << 20)],
        )
        pb_grpc.add_TrainingJobServiceServicer_to_server(TrainingJobServicer(self), server)
        checker = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checker, server)
        name = pb.DESCRIPTOR.services_by_name["TrainingJobService"].full_name
        for each in ("", name):
            checker.set(each, health_pb2.HealthCheckResponse.SERVING)
        reflection.enable_server_reflection((name, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        address = f"{self.settings.grpc_host}:{self.settings.grpc_port}"
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: address already in use; choose another port") from error
        return server, port

    def stop(self) -> None:
        """Stop everything. Running jobs go on from their last checkpoint when a service next starts here."""
        self.closing.set()
        self._wake.set()
        self._grpc.stop(grace=1.0).wait()
        self._http.stop()
        self._admission.join()
        self.scheduler.stop()
        self.store.close()
        self._lock_file.close()

    @staticmethod
    def now() -> float:
        """Seconds since the epoch."""
        return time.time()

    def controllers(self) -> list[Controller]:
        """Of all jobs that hold resources."""
        with self._lock:
            return list(self._controllers.values())

    def _count_states(self) -> dict[JobState, int]:
        counts = dict.fromkeys(JobState, 0)
        for row in self.store.in_states(JobState):
            counts[row.state] += 1
        return counts

    # -- what users ask ---------------------------------------------------------------------------------------------

    def create(self, job: str, request_id: str, spec: TrainingJobSpec) -> JobRow:
        """Check a job as far as it can be checked without running it, and queue it. Raises SpecError, ConflictError."""
        job = job or f"{_slug(spec.task.function)}-{secrets.token_hex(3)}"
        if not _JOB_ID.fullmatch(job):
            problem = f"{job!r}; allowed: 1 to 63 of a-z, 0-9 and -, a letter first, no - at the end"
            raise SpecError([Violation("training_job_id", problem)])
        if not request_id:
            self._refuse_taken(job)
        description = probe_task(spec, self.code.unpacked(spec.task.code_bundle), self.settings.probe_timeout_seconds)
        self._check_device(spec)
        _check_compression(spec, description)
        spec = self._place(spec, description)
        total_steps = spec.total_steps(description.num_samples)
        if spec.schedule.warmup_steps >= total_steps:
            problem = f"{spec.schedule.warmup_steps} leaves nothing of the {total_steps} steps of the job"
            raise SpecError([Violation("schedule.warmup_steps", problem)])
        row = self.store.create(
            JobRow(
                id=job,
                request_id=request_id,
                spec=spec.model_dump_json(),
                description=description.to_json(),
                state=JobState.QUEUED,
                reason="created",
                workers=spec.placement.workers,
                incarnation=0,
                total_steps=total_steps,
                created=self.now(),
                ended=None,
                result=Result(),
            )
        )
        self._wake.set()
        return row

    def _refuse_taken(self, job: str) -> None:
        if any(row.id == job for row in self.store.in_states(JobState)):
            raise ConflictError(f"training_job_id: {job!r} is taken; choose another --name")

    def _check_device(self, spec: TrainingJobSpec) -> None:
        if spec.placement.device == "cuda" and not self.scheduler.totals().get("GPU"):
            problem = "'cuda' is not there: no host of the cluster has a GPU; allowed: cpu"
            raise SpecError([Violation("placement.device", problem)])

    def _place(self, spec: TrainingJobSpec, description: TaskDescription) -> TrainingJobSpec:
        """The spec with a number of servers. Raises SpecError for a job that cannot fit the cluster."""
        layout = description.layout(spec)
        num_hosts = self.scheduler.num_hosts()
        servers = spec.placement.servers or choose_num_servers(layout, min(num_hosts, spec.placement.workers))
        spec = spec.model_copy(update={"placement": spec.placement.model_copy(update={"servers": servers})})
        needed = footprint(spec, layout, num_hosts=num_hosts)
        problem = explain_refusal(needed, int(self.scheduler.totals().get("memory", 0)))
        if problem:
            raise SpecError([Violation("placement", problem)])
        return spec

    def cancel(self, job: str) -> JobRow:
        """See VERBS."""
        return self._steer(job, "cancel", JobState.CANCELLING, "cancel was asked for")

    def pause(self, job: str) -> JobRow:
        """See VERBS."""
        return self._steer(job, "pause", JobState.PAUSING, "pause was asked for")

    def resume(self, job: str) -> JobRow:
        """See VERBS."""
        return self._steer(job, "resume", JobState.RUNNING, "resume was asked for")

    def _steer(self, job: str, verb: str, state: JobState, reason: str) -> JobRow:
        with self._lock:
            row = self.store.get(job)
            check_verb(row.name, row.state, verb)
            done = {"pause": {JobState.PAUSING, JobState.PAUSED}, "resume": {JobState.RUNNING}}
            if row.state == state or row.state in done.get(verb, ()):
                return row
            controller = self._controllers.get(job)
            if verb == "resume" and controller is None:
                state = JobState.RECOVERING  # it was paused when the service was restarted, and holds no resources
                self._wake.set()
            row = self.store.move(job, state, reason, self.now())
            if controller is not None:
                controller.ask(verb)
            elif verb == "cancel":
                row = self.store.move(job, JobState.CANCELLED, "cancelled while nothing of it ran", self.now())
        return row

    def scale(self, job: str, workers: int) -> JobRow:
        """Change the number of workers of a live job. Raises SpecError, ConflictError."""
        with self._lock:
            row = self.store.get(job)
            check_verb(row.name, row.state, "scale")
            spec = json.loads(row.spec)
            spec["placement"]["workers"] = workers
            spec_from_dict(spec)
            self.store.update(job, workers=workers)
            self.store.note(job, f"scale from {row.workers} to {workers} workers was asked for", self.now())
            controller = self._controllers.get(job)
            if controller is not None:
                controller.ask("scale", workers)
        self._wake.set()
        return self.store.get(job)

    # -- admission --------------------------------------------------------------------------------------------------

    def _take_over(self) -> None:
        """Jobs that were live when the service last stopped go on from their last checkpoint."""
        for row in self.store.in_states(set(JobState) - ENDED - {JobState.QUEUED, JobState.PAUSED}):
            now = self.now()
            if row.state == JobState.PAUSING:
                self.store.move(row.id, JobState.PAUSED, "paused; the service was restarted meanwhile", now)
            elif row.state == JobState.CANCELLING:
                self.store.move(row.id, JobState.CANCELLED, "cancelled; the service was restarted meanwhile", now)
            elif row.state != JobState.RECOVERING:
                self.store.move(row.id, JobState.RECOVERING, "the service was restarted", now)

    def _admit(self) -> None:
        """First come, first served."""
        try:
            self.scheduler.wait_ready()
        except ServiceUnavailableError as error:
            for row in self.store.in_states({JobState.QUEUED, JobState.RECOVERING}):
                self.store.note(row.id, str(error), self.now())
        while not self.closing.is_set():
            try:
                self._admit_next()
            except Exception:
                log.exception("admission")
            self._wake.wait(ADMIT_SECONDS)
            self._wake.clear()

    def _admit_next(self) -> None:
        waiting = [
            r for r in self.store.in_states({JobState.QUEUED, JobState.RECOVERING}) if r.id not in self._controllers
        ]
        blocked = ""
        for row in waiting:
            reason = f"waiting behind {blocked}" if blocked else self._try_to_start(row)
            if reason:
                blocked = blocked or row.name
                if reason != row.reason:
                    self._say(row, reason)

    def _say(self, row: JobRow, reason: str) -> None:
        with self._lock:
            if self.store.get(row.id).state == row.state:
                self.store.move(row.id, row.state, reason, self.now())

    def _try_to_start(self, row: JobRow) -> str:
        """Start a job, or say what it waits for."""
        spec = spec_from_dict(json.loads(row.spec))
        users = [controller.job_name for controller in self.controllers()]
        reason = self.scheduler.shortage(spec.placement, row.workers, users)
        if reason:
            return reason
        description = TaskDescription.from_json(row.description)
        layout_bytes = 8 * sum(p.numel for p in description.model.parameters)
        code = self.code.read(spec.task.code_bundle)
        placement = self.scheduler.reserve(spec, row.workers, layout_bytes)
        if placement is None:
            return (
                "waiting for room: there are CPUs enough, but not in pieces of the size it needs, or too little memory"
            )
        with self._lock:
            row = self.store.get(row.id)
            if row.state in ENDED:  # cancelled meanwhile
                placement.release()
                return ""
            if row.state == JobState.QUEUED:
                self.store.move(row.id, JobState.STARTING, "starting servers and workers", self.now())
            controller = Controller(row, spec, description, code, self.store, self.settings, placement, self._ended)
            self._controllers[row.id] = controller
        controller.start()
        return ""

    def _ended(self, job: str) -> None:
        with self._lock:
            self._controllers.pop(job, None)
        self._wake.set()


def _lock(directory: Path) -> IO[str]:
    """Keep other services out of a data directory. Raises OSError when one is in it."""
    file = (directory / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise OSError(f"another service uses the data directory {directory}; choose another with --data-dir") from error
    return file


def _check_compression(spec: TrainingJobSpec, description: TaskDescription) -> None:
    compression = spec.compression
    problem = compression_problem(compression, description.layout(spec))
    if problem:
        raise SpecError([Violation("compression.name", f"{compression.name!r}: {problem}")])


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "job"
