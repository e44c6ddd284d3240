"""A handle for one job of a service."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from steepest.analyses import Curvature, curvature_from_proto
from steepest.errors import JobFailedError, ServiceUnavailableError, SpecError, TooManyCallsError, Violation
from steepest.follow import news_of
from steepest.jobs import (
    MAX_PRIORITY,
    Checkpoint,
    Evaluation,
    Event,
    JobInfo,
    LogLine,
    Progress,
    StepHistograms,
    checkpoint_from_proto,
    event_from_proto,
    histograms_from_proto,
    job_from_proto,
    line_from_proto,
    progress_from_proto,
    record_from_proto,
)
from steepest.v1 import training_jobs_pb2 as pb

if TYPE_CHECKING:
    from steepest.client import Client

RECONNECT_SECONDS = 60.0
RETRY_SECONDS = 0.5


class Job:
    """A handle for one job: `name` is its resource name, trainingJobs/{id}.

    What changes a job takes an etag: that of a JobInfo, so that it is refused (ChangedError) when state, workers or
    priority have changed since.
    """

    def __init__(self, client: Client, name: str) -> None:
        self.name = name
        self._client = client
        self._stub = client._stub  # a handle is a part of its client

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        return self._client._call(method, request)

    def _act(self, method: Callable[..., Any], request: Any) -> JobInfo:
        return job_from_proto(self._call(method, request))

    def get(self) -> JobInfo:
        """The job as it is now. Raises NotFoundError."""
        return job_from_proto(self._call(self._stub.GetTrainingJob, pb.GetTrainingJobRequest(name=self.name)))

    def watch(self, *, logs: bool = False) -> Iterator[Event | Progress | LogLine | JobInfo]:
        """Events and progress until the job ends; the last item is the JobInfo of its end.

        logs: what user code prints, too. A broken connection is taken up again, without gap or repeat of events and
        lines.
        """
        sequence = offset = 0
        broken_since: float | None = None
        while True:
            request = pb.WatchTrainingJobRequest(name=self.name, after_sequence=sequence, logs=logs, log_offset=offset)
            try:
                for update in self._stub.WatchTrainingJob(request):
                    broken_since = None
                    match update.WhichOneof("update"):
                        case "event":
                            sequence = update.event.sequence
                            yield event_from_proto(update.event)
                        case "line":
                            offset = update.line.offset
                            yield line_from_proto(update.line)
                        case "progress":
                            yield progress_from_proto(update.progress)
                        case "ended":
                            yield job_from_proto(update.ended)
                            return
            except grpc.RpcError as error:
                broken_since = self._pause_before_retry(error, broken_since)

    def logs(self, *, follow: bool = False, offset: int = 0) -> Iterator[LogLine]:
        """What user code has printed. offset: of the last line seen. follow: go on until the job ends.

        A broken connection is taken up again, without gap or repeat.
        """
        broken_since: float | None = None
        while True:
            request = pb.StreamLogsRequest(name=self.name, offset=offset, follow=follow)
            try:
                for response in self._stub.StreamLogs(request):
                    broken_since = None
                    for line in response.lines:
                        offset = line.offset
                        yield line_from_proto(line)
            except grpc.RpcError as error:
                broken_since = self._pause_before_retry(error, broken_since)
            else:
                return

    def _pause_before_retry(self, error: grpc.RpcError, since: float | None) -> float:
        """Wait a moment; since when the connection is broken. Raises what cannot be mended, or lasts too long."""
        since = since or time.monotonic()
        found = self._client.translate(error)
        is_broken = error.code() == grpc.StatusCode.UNAVAILABLE or isinstance(found, TooManyCallsError)
        if not is_broken or time.monotonic() - since > RECONNECT_SECONDS:
            raise found from None
        time.sleep(max(RETRY_SECONDS, getattr(found, "retry_seconds", 0.0)))
        return since

    def wait(
        self,
        *,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        on_evaluation: Callable[[Evaluation], None] | None = None,
        on_checkpoint: Callable[[Checkpoint], None] | None = None,
    ) -> JobInfo:
        """Wait for the end, and call these in the meantime, here and never in the way of the training.

        on_step: with each record that `history` gives, in order. on_evaluation, on_checkpoint: with each, in order.
        They lag by a second; what a job does again, after a rollback say, is told again. A checkpoint that has made
        room for newer ones within the second is not.

        Raises JobFailedError unless the job succeeded, and what the callbacks raise: the job goes on then.
        """
        info = self._told(on_step, on_evaluation, on_checkpoint)
        if info.state == "SUCCEEDED":
            return info
        raise JobFailedError(f"{self.name} {info.state}: {info.error or info.reason}")

    def _told(self, *callbacks: Callable[[Any], None] | None) -> JobInfo:
        """Tell these of records, evaluations and checkpoints until the job ends."""
        if not any(callbacks):
            for update in self.watch():
                if isinstance(update, JobInfo):
                    return update
            raise ServiceUnavailableError(f"the watch of {self.name} ended before the job did")
        for news in news_of(self, *(callback is not None for callback in callbacks)):
            all_found: tuple[list[Any], ...] = news.records, news.evaluations, news.checkpoints
            for callback, found in zip(callbacks, all_found, strict=True):
                for item in found if callback is not None else ():
                    callback(item)  # type: ignore[misc]
        return news.info

    def cancel(self, *, etag: str = "") -> JobInfo:
        """Stop at the next step boundary, keeping a checkpoint."""
        return job_from_proto(
            self._call(self._stub.CancelTrainingJob, pb.CancelTrainingJobRequest(name=self.name, etag=etag))
        )

    def pause(self, *, etag: str = "") -> JobInfo:
        """Hold at the next step boundary."""
        return job_from_proto(
            self._call(self._stub.PauseTrainingJob, pb.PauseTrainingJobRequest(name=self.name, etag=etag))
        )

    def resume(self, *, etag: str = "") -> JobInfo:
        """Go on."""
        return job_from_proto(
            self._call(self._stub.ResumeTrainingJob, pb.ResumeTrainingJobRequest(name=self.name, etag=etag))
        )

    def scale(self, workers: int, *, etag: str = "") -> JobInfo:
        """Change the number of workers. Never changes the result."""
        if not isinstance(workers, int) or not 0 < workers < 1 << 31:
            raise SpecError([Violation("workers", f"{workers!r} must be a number of workers, at least 1")])
        request = pb.ScaleTrainingJobRequest(name=self.name, workers=workers, etag=etag)
        return job_from_proto(self._call(self._stub.ScaleTrainingJob, request))

    def set_priority(self, priority: int, *, etag: str = "") -> JobInfo:
        """Have the job wait before others of less priority. -1000 to 1000; jobs begin with 0."""
        if not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
            raise SpecError([Violation("priority", f"{priority!r}; allowed: {-MAX_PRIORITY} to {MAX_PRIORITY}")])
        request = pb.SetPriorityRequest(name=self.name, priority=priority, etag=etag)
        return job_from_proto(self._call(self._stub.SetPriority, request))

    def events(self, after: int = 0) -> list[Event]:
        """The events so far. after: the sequence number of the last one seen."""
        request = pb.ListEventsRequest(name=self.name, after_sequence=after)
        return [event_from_proto(event) for event in self._call(self._stub.ListEvents, request).events]

    def evaluations(self, after: int = -1) -> list[Evaluation]:
        """The evaluations so far, in order. after: the step of the last one seen."""
        request = pb.ListEvaluationsRequest(name=self.name, after_step=after)
        found = self._call(self._stub.ListEvaluations, request).evaluations
        return [Evaluation(message.step, dict(message.metrics)) for message in found]

    def checkpoints(self, after: int | None = None) -> list[Checkpoint]:
        """The checkpoints that there are, newest first, each verified. after: only those of later steps."""
        request = pb.ListCheckpointsRequest(name=self.name, after_step=after)
        found = self._call(self._stub.ListCheckpoints, request)
        return [checkpoint_from_proto(message) for message in found.checkpoints]

    def delete(self, *, etag: str = "") -> None:
        """Delete the job, which has ended, with its checkpoints, records and log. Raises ConflictError."""
        self._call(self._stub.DeleteTrainingJob, pb.DeleteTrainingJobRequest(name=self.name, etag=etag))

    def curvature(
        self,
        *,
        step: int | None = None,
        top: int = 0,
        samples: int = 0,
        processes: int = 0,
        matrix: str = "hessian",
        jacobian: int = 0,
        say: Callable[[str], None] = lambda text: None,
    ) -> Curvature:
        """Measure the curvature of the loss at a checkpoint, on hosts of the cluster: the newest, or that of `step`.

        top: how many of the largest eigenvalues. samples: of the training data, from the first on. processes: that
        compute. 0: the service's default. matrix: hessian or gauss_newton. jacobian: for how many samples the Jacobian
        of the outputs by the parameters is looked at. say: called with what is being done.

        Raises ConflictError without such a checkpoint, SpecError for a model that cannot be differentiated twice.
        """
        numbers = {"top": top, "samples": samples, "processes": processes, "jacobian": jacobian}
        request = pb.MeasureCurvatureRequest(name=self.name, step=step, matrix=matrix, **numbers)
        return curvature_from_proto(self._client.result(self._stub.MeasureCurvature(request), say))

    def history(self, first_step: int = 0, *, signals: bool = False) -> Iterator[dict[str, Any]]:
        """The records of all steps, as the .proto file names their fields.

        parameter_norms by parameter; with `signals`, those by name and parameter, in the steps that they are measured
        in.
        """
        while True:
            request = pb.QueryHistoryRequest(name=self.name, first_step=first_step, signals=signals)
            page = self._call(self._stub.QueryHistory, request)
            if not page.records:
                return
            for record in page.records:
                yield record_from_proto(record, page.parameter_names, page.activation_names)
            first_step = page.records[-1].step + 1

    def histograms(self, parameters: Sequence[str] = (), first_step: int = 0) -> Iterator[StepHistograms]:
        """How large the elements of parameters' gradients are, in the steps that this is counted in.

        parameters: their names; none: all. Raises SpecError for an unknown one.
        """
        while True:
            request = pb.QueryHistogramsRequest(name=self.name, first_step=first_step, parameters=parameters)
            page = self._call(self._stub.QueryHistograms, request)
            if not page.histograms:
                return
            yield from histograms_from_proto(page)
            first_step = page.histograms[-1].step + 1

    def download(self, directory: str | Path, *, step: int | None = None, best: bool = False) -> Path:
        """Fetch a checkpoint's files and its manifest.json: the newest, that of `step`, or that of the best evaluation.

        Raises ConflictError when there is none.
        """
        target = Path(directory)
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpecError([Violation("--output", f"cannot write to {target}: {error.strerror}")]) from None
        request = pb.DownloadCheckpointRequest(name=self.name, step=step, best=best)
        current, file = "", None
        try:
            for piece in self._stub.DownloadCheckpoint(request):
                if piece.file != current:
                    if file is not None:
                        file.close()
                    current = piece.file
                    file = (target / Path(current).name).open("wb")
                assert file is not None  # noqa: S101  # the first piece names its file
                file.write(piece.data)
        except grpc.RpcError as error:
            raise self._client.translate(error) from None
        finally:
            if file is not None:
                file.close()
        return target
