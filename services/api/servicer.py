"""TrainingJobService over gRPC: a thin layer over `services.jobs.operations` and the store."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import grpc

from ps.checkpoint.files import (
    Written,
    best_verified,
    checkpoints,
    files_of,
    newest_verified,
    step_of,
    verified_at,
)
from ps.numerics.histogram import BINS, edges
from ps.step.signals import NAMES
from ps.wire import convert as ps_convert
from services.api.convert import (
    check_to_proto,
    checkpoint_to_proto,
    curvature_to_proto,
    event_to_proto,
    job_to_proto,
    line_to_proto,
)
from services.api.server_info import ServerFacts
from services.api.watches import Watches
from services.jobs.analysis import Analyses, CheckRequest, CurvatureRequest
from services.jobs.job_log import JobLog
from services.jobs.operations import Operations
from services.jobs.task_probe import TaskDescription, parameter_names
from services.settings import Settings
from services.store.history import JobHistory
from services.store.lifecycle import ENDED
from services.store.selection import Selection
from services.store.store import JobRow, Store
from steepest.convert import spec_from_proto
from steepest.errors import ConflictError, OutOfRangeError, ServiceUnavailableError, SpecError, Violation
from steepest.v1 import training_jobs_pb2 as pb
from steepest.v1 import training_jobs_pb2_grpc as pb_grpc

PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000
HISTORY_PAGE_SIZE = 10_000
HISTORY_PAGE_NUMBERS = 200_000  # norms and signals of parameters in a page
CHUNK_BYTES = 1 << 20
MAX_ENDED = 10_000  # jobs whose messages are kept
PREFIX = "trainingJobs/"


class TrainingJobServicer(pb_grpc.TrainingJobServiceServicer):
    """The methods of the .proto file; their names are the wire's."""

    def __init__(
        self,
        operations: Operations,
        store: Store,
        settings: Settings,
        analyses: Analyses,
        facts: ServerFacts,
        closing: threading.Event,
    ) -> None:
        self._facts = facts
        self._operations = operations
        self._analyses = analyses
        self._store = store
        self._settings = settings
        self._closing = closing
        self._watches = Watches(store, settings)
        self._of_ended: dict[str, tuple[object, pb.TrainingJob]] = {}

    def _id(self, name: str) -> str:
        if not name.startswith(PREFIX) or len(name) == len(PREFIX):
            raise SpecError([Violation("name", f"{name!r} is no job name; allowed: {PREFIX}{{id}}")])
        return name.removeprefix(PREFIX)

    def _row(self, name: str) -> JobRow:
        return self._store.get(self._id(name))

    def _message(self, row: JobRow) -> pb.TrainingJob:
        return self._messages([row])[0]

    def _messages(self, rows: Sequence[JobRow]) -> list[pb.TrainingJob]:
        now = time.time()
        return [self._ended(row, now) if row.state in ENDED else self._fresh(row, now) for row in rows]

    def _fresh(self, row: JobRow, now: float) -> pb.TrainingJob:
        return job_to_proto(row, self._settings, self._history(row.id).samples_per_second(), now)

    def _ended(self, row: JobRow, now: float) -> pb.TrainingJob:
        """Hardly anything changes of a job that has ended, and a list has many of them."""
        seen = row.created, row.ended, row.etag, row.reason, row.result  # not its description, which may be large
        known = self._of_ended.get(row.id)
        if known is None or known[0] != seen:
            if len(self._of_ended) >= MAX_ENDED:
                self._of_ended.clear()
            known = self._of_ended[row.id] = seen, self._fresh(row, now)
        return known[1]

    def _history(self, job: str) -> JobHistory:
        return JobHistory(self._settings.history_of(job))

    def UploadCode(  # noqa: N802
        self, request_iterator: Iterator[pb.UploadCodeRequest], context: grpc.ServicerContext
    ) -> pb.CodeBundle:
        """See the .proto file."""
        return pb.CodeBundle(name=self._operations.add_code(request.data for request in request_iterator))

    def CreateTrainingJob(  # noqa: N802
        self, request: pb.CreateTrainingJobRequest, context: grpc.ServicerContext
    ) -> pb.TrainingJob:
        """See the .proto file."""
        spec = spec_from_proto(request.spec)
        return self._message(self._operations.create(request.training_job_id, request.request_id, spec))

    def GetTrainingJob(  # noqa: N802
        self, request: pb.GetTrainingJobRequest, context: grpc.ServicerContext
    ) -> pb.TrainingJob:
        """See the .proto file."""
        return self._message(self._row(request.name))

    def ListTrainingJobs(  # noqa: N802
        self, request: pb.ListTrainingJobsRequest, context: grpc.ServicerContext
    ) -> pb.ListTrainingJobsResponse:
        """See the .proto file."""
        size = _page_size(request.page_size, PAGE_SIZE, MAX_PAGE_SIZE)
        selection = Selection.of(request.filter, request.order_by)
        rows, following = self._store.page(size, selection, request.page_token)
        return pb.ListTrainingJobsResponse(training_jobs=self._messages(rows), next_page_token=following)

    def WatchTrainingJob(  # noqa: N802
        self, request: pb.WatchTrainingJobRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchTrainingJobResponse]:
        """See the .proto file. Progress is coalesced: a slow watcher gets the newest."""
        job = self._row(request.name).id
        sequence, offset = max(0, request.after_sequence), request.log_offset
        progress = None
        printed = self._log(job)
        with self._watches.of(job) as watched:
            while context.is_active():
                watched.look(self._watches.pause / 2)
                row = watched.row  # before the rest, so that all of it is there if the job has ended
                if sequence > len(watched.events):
                    problem = f"after_sequence {sequence} is beyond the last event, {len(watched.events)}"
                    raise OutOfRangeError(f"{problem}: it is of another job, or of another service; watch from 0")
                newest = watched.progress
                if newest is not None and newest is not progress:
                    progress = newest
                    yield newest
                for event in watched.events[sequence:]:
                    sequence += 1
                    yield event
                for stored in printed.read(offset) if request.logs else ():
                    offset = stored.offset
                    yield pb.WatchTrainingJobResponse(line=line_to_proto(stored))
                if row.state in ENDED:
                    yield pb.WatchTrainingJobResponse(ended=self._message(self._store.get(job)))
                    return
                self._closing.wait(self._watches.pause)
                if self._closing.is_set():
                    raise ServiceUnavailableError("the service is stopping")

    def StreamLogs(  # noqa: N802
        self, request: pb.StreamLogsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.StreamLogsResponse]:
        """See the .proto file."""
        if request.offset < 0:
            raise SpecError([Violation("offset", f"{request.offset} must not be negative")])
        job, offset = self._row(request.name).id, request.offset
        printed = self._log(job)
        with self._watches.opened():
            while context.is_active():
                has_ended = self._store.get(job).state in ENDED  # before the read, so that all of it is there then
                lines = printed.read(offset)
                if lines:
                    offset = lines[-1].offset
                    yield pb.StreamLogsResponse(lines=map(line_to_proto, lines))
                elif has_ended or not request.follow:
                    return
                else:
                    self._closing.wait(self._watches.pause)
                    if self._closing.is_set():
                        raise ServiceUnavailableError("the service is stopping")

    def _log(self, job: str) -> JobLog:
        return JobLog(self._settings.log_of(job), self._settings.max_log_bytes)

    def CancelTrainingJob(  # noqa: N802
        self, request: pb.CancelTrainingJobRequest, context: grpc.ServicerContext
    ) -> pb.TrainingJob:
        """See the .proto file."""
        return self._message(self._operations.cancel(self._id(request.name), request.etag))

    def PauseTrainingJob(  # noqa: N802
        self, request: pb.PauseTrainingJobRequest, context: grpc.ServicerContext
    ) -> pb.TrainingJob:
        """See the .proto file."""
        return self._message(self._operations.pause(self._id(request.name), request.etag))

    def ResumeTrainingJob(  # noqa: N802
        self, request: pb.ResumeTrainingJobRequest, context: grpc.ServicerContext
    ) -> pb.TrainingJob:
        """See the .proto file."""
        return self._message(self._operations.resume(self._id(request.name), request.etag))

    def ScaleTrainingJob(  # noqa: N802
        self, request: pb.ScaleTrainingJobRequest, context: grpc.ServicerContext
    ) -> pb.TrainingJob:
        """See the .proto file."""
        return self._message(self._operations.scale(self._id(request.name), request.workers, request.etag))

    def SetPriority(  # noqa: N802
        self, request: pb.SetPriorityRequest, context: grpc.ServicerContext
    ) -> pb.TrainingJob:
        """See the .proto file."""
        return self._message(self._operations.set_priority(self._id(request.name), request.priority, request.etag))

    def QueryHistory(  # noqa: N802
        self, request: pb.QueryHistoryRequest, context: grpc.ServicerContext
    ) -> pb.QueryHistoryResponse:
        """See the .proto file."""
        row = self._row(request.name)
        names = parameter_names(row)
        numbers = len(names) * (1 + len(NAMES) * request.signals)
        most = max(1, min(HISTORY_PAGE_SIZE, HISTORY_PAGE_NUMBERS // numbers))
        size = _page_size(request.page_size, most, most)
        description = TaskDescription.from_json(row.description)
        records = self._history(row.id).records(request.first_step, size, signals=request.signals)
        shown = [ps_convert.record_to_proto(record, description.logged_names) for record in records]
        functions = description.activations if request.signals else ()
        return pb.QueryHistoryResponse(records=shown, parameter_names=names, activation_names=functions)

    def QueryHistograms(  # noqa: N802
        self, request: pb.QueryHistogramsRequest, context: grpc.ServicerContext
    ) -> pb.QueryHistogramsResponse:
        """See the .proto file."""
        row = self._row(request.name)
        names = parameter_names(row)
        wanted = list(request.parameters) or names
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise SpecError([Violation("parameters", f"{unknown[0]!r} is no parameter of {row.name}")])
        most = max(1, HISTORY_PAGE_NUMBERS // (len(wanted) * BINS))
        size = _page_size(request.page_size, most, most)
        steps, counts = self._history(row.id).histograms(request.first_step, limit=size)
        chosen = [names.index(name) for name in wanted]
        shown = [
            pb.StepHistograms(step=step, parameters=[pb.Histogram(counts=rows[index]) for index in chosen])
            for step, rows in zip(steps.tolist(), counts, strict=True)
        ]
        return pb.QueryHistogramsResponse(histograms=shown, parameter_names=wanted, edges=edges())

    def ListEvents(  # noqa: N802
        self, request: pb.ListEventsRequest, context: grpc.ServicerContext
    ) -> pb.ListEventsResponse:
        """See the .proto file."""
        found = self._store.events_after(self._row(request.name).id, request.after_sequence)
        return pb.ListEventsResponse(events=map(event_to_proto, found))

    def ListEvaluations(  # noqa: N802
        self, request: pb.ListEvaluationsRequest, context: grpc.ServicerContext
    ) -> pb.ListEvaluationsResponse:
        """See the .proto file."""
        found = self._store.evaluations_of(self._row(request.name).id, request.after_step)
        shown = [pb.StepEvaluation(step=step, metrics=metrics) for step, metrics in found]
        return pb.ListEvaluationsResponse(evaluations=shown)

    def ListCheckpoints(  # noqa: N802
        self, request: pb.ListCheckpointsRequest, context: grpc.ServicerContext
    ) -> pb.ListCheckpointsResponse:
        """See the .proto file."""
        directory = self._settings.checkpoints_of(self._row(request.name).id)
        after = request.after_step if request.HasField("after_step") else -1
        wanted = [path for path in checkpoints(directory) if step_of(path) > after]
        best = best_verified(directory) if wanted else None
        found = []
        for path in wanted:
            with contextlib.suppress(FileNotFoundError):  # pruned since
                found.append(checkpoint_to_proto(path, None if best is None else best.path))
        return pb.ListCheckpointsResponse(checkpoints=found)

    def DeleteTrainingJob(  # noqa: N802
        self, request: pb.DeleteTrainingJobRequest, context: grpc.ServicerContext
    ) -> pb.DeleteTrainingJobResponse:
        """See the .proto file."""
        self._operations.delete(self._id(request.name), request.etag)
        return pb.DeleteTrainingJobResponse()

    def CheckGradients(  # noqa: N802
        self, request: pb.CheckGradientsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.CheckGradientsResponse]:
        """See the .proto file."""
        asked = CheckRequest(request.got, request.expected, request.tolerance, request.processes)
        spec = spec_from_proto(request.spec)
        for said in self._analyses.check_gradients(spec, asked, context.add_callback):
            if isinstance(said, str):
                yield pb.CheckGradientsResponse(progress=said)
            else:
                yield pb.CheckGradientsResponse(check=check_to_proto(said))

    def MeasureCurvature(  # noqa: N802
        self, request: pb.MeasureCurvatureRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.MeasureCurvatureResponse]:
        """See the .proto file."""
        asked = CurvatureRequest(
            request.step if request.HasField("step") else None,
            request.top,
            request.samples,
            request.processes,
            request.matrix,
            request.jacobian,
        )
        for said in self._analyses.curvature(self._row(request.name), asked, context.add_callback):
            if isinstance(said, str):
                yield pb.MeasureCurvatureResponse(progress=said)
            else:
                yield pb.MeasureCurvatureResponse(curvature=curvature_to_proto(said))

    def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.ServerInfo:
        """See the .proto file."""
        return self._facts.message(MAX_PAGE_SIZE)

    def DownloadCheckpoint(  # noqa: N802
        self, request: pb.DownloadCheckpointRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.DownloadCheckpointResponse]:
        """See the .proto file."""
        row = self._row(request.name)
        with contextlib.ExitStack() as stack:
            for path, file in self._open(row, request, stack):
                while piece := file.read(CHUNK_BYTES):
                    yield pb.DownloadCheckpointResponse(file=path.name, data=piece)

    def _open(
        self, row: JobRow, request: pb.DownloadCheckpointRequest, stack: contextlib.ExitStack
    ) -> list[tuple[Path, IO[bytes]]]:
        """The files of a checkpoint, all open, so that none is lost when the job prunes it meanwhile."""
        directory = self._settings.checkpoints_of(row.id)
        while (found := _find_checkpoint(directory, request)) is not None:
            with contextlib.suppress(FileNotFoundError):  # pruned since: there is a newer one
                return [(path, stack.enter_context(path.open("rb"))) for path in files_of(found.path)]
        if request.HasField("step") or request.best:
            wanted = "of a best evaluation" if request.best else f"of step {request.step}"
            steps = ", ".join(str(step_of(path)) for path in reversed(checkpoints(directory))) or "none"
            raise ConflictError(f"{row.name} has no checkpoint {wanted}; there are those of the steps: {steps}")
        raise ConflictError(f"{row.name} has no checkpoint yet; it is at step {row.result.step}")


def _find_checkpoint(directory: Path, request: pb.DownloadCheckpointRequest) -> Written | None:
    if request.best:
        return best_verified(directory)
    return verified_at(directory, request.step) if request.HasField("step") else newest_verified(directory)


def _page_size(asked: int, default: int, maximum: int) -> int:
    if asked < 0:
        raise SpecError([Violation("page_size", f"{asked} must not be negative")])
    return min(asked or default, maximum)
