"""The client of a steepest service. Needs neither ray nor torch."""

from __future__ import annotations

import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from steepest import contexts
from steepest.analyses import GradientCheck, check_from_proto
from steepest.channel import open_channel, with_token
from steepest.convert import change_to_proto, spec_to_proto
from steepest.errors import (
    ChangedError,
    ConflictError,
    NotFoundError,
    OutOfRangeError,
    PermissionDeniedError,
    ServiceUnavailableError,
    SpecError,
    SteepestError,
    TooManyCallsError,
    UnauthenticatedError,
    Violation,
)
from steepest.job import Job
from steepest.jobs import JobInfo, job_from_proto
from steepest.server_info import ServerInfo, server_info_from_proto
from steepest.submission import check_submission, left_out
from steepest.v1 import training_jobs_pb2 as pb
from steepest.v1 import training_jobs_pb2_grpc as pb_grpc

__all__ = ["Client", "Job"]

CONNECT_SECONDS = 5.0
CALL_SECONDS = 30.0
CREATE_SECONDS = 900.0  # the service loads the task meanwhile
CHUNK_BYTES = 1 << 20


class Client:
    """A connection to the service at `address`; by default what STEEPEST_SERVER says, or the context in use.

    token: by default what STEEPEST_TOKEN says. tls_ca: a PEM file with the certificate of the authority that the
    service's own is checked against, by default what STEEPEST_TLS_CA says; "https://" before the address also asks for
    TLS, with the authorities that gRPC knows. Empty for neither, whatever the variables say. certificate: (certificate,
    key), PEM files, for a service that asks its callers for one; by default those that STEEPEST_CLIENT_CERT and
    STEEPEST_CLIENT_KEY name.

    Raises ServiceUnavailableError when nothing answers there, SpecError for a token that would go unencrypted to
    another machine.
    """

    def __init__(
        self,
        address: str = "",
        *,
        token: str | None = None,
        tls_ca: str | Path | None = None,
        certificate: tuple[str | Path, str | Path] | None = None,
    ) -> None:
        self.address = address = address or os.environ.get("STEEPEST_SERVER") or contexts.read().address
        token = os.environ.get("STEEPEST_TOKEN", "") if token is None else token
        tls_ca = os.environ.get("STEEPEST_TLS_CA") if tls_ca is None else tls_ca
        self._channel = open_channel(address, tls_ca, token, certificate or _own_certificate())
        self._stub = pb_grpc.TrainingJobServiceStub(with_token(self._channel, token))
        try:
            grpc.channel_ready_future(self._channel).result(timeout=CONNECT_SECONDS)
        except grpc.FutureTimeoutError:
            self._channel.close()
            raise ServiceUnavailableError(
                f"no service answers at {address}; start one with `steepest serve`, or name another with --server or "
                "STEEPEST_SERVER; one that uses TLS needs --tls-ca FILE"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def submit(
        self,
        task: str,
        *,
        name: str = "",
        request_id: str = "",
        arguments: Mapping[str, Any] | None = None,
        **spec: Any,
    ) -> Job:
        """Submit a job; what it trains with is in `spec`, field by field: see `steepest.spec.TrainingJobSpec`.

        task: "path/to/file.py:function" or "package.module:function". arguments: of the function.
        request_id: the same again gives the first one's job, so that a retry is safe.

        Raises SpecError when the job or its task is refused, ConflictError when the name is taken.
        """
        return self._create(name, self._sent(task, arguments, spec), request_id)

    def _sent(self, task: str, arguments: Mapping[str, Any] | None, spec: Mapping[str, Any]) -> pb.TrainingJobSpec:
        """A spec whose code the service has. Raises SpecError."""
        bundle, checked = check_submission(task, arguments or {}, spec)
        for problem in left_out(bundle):
            warnings.warn(problem, stacklevel=3)
        message = spec_to_proto(checked)
        if bundle.data:
            message.task.code_bundle = self._upload(bundle.data)
        return message

    def _create(self, name: str, spec: pb.TrainingJobSpec, request_id: str = "") -> Job:
        request = pb.CreateTrainingJobRequest(
            training_job_id=name, spec=spec, request_id=request_id or str(uuid.uuid4())
        )
        return Job(self, self._call(self._stub.CreateTrainingJob, request, CREATE_SECONDS).name)

    def replay(self, job: str, *, name: str = "", workers: int | None = None) -> Job:
        """Submit a job again, with all that health rules have changed in it from the start: same bits, no way back.

        Its rules only record. name: of the new job. workers: other than those of the first.

        Raises NotFoundError, and what `submit` does.
        """
        known = self.job(job).get()
        message = spec_to_proto(known.spec)
        for rule, action in known.spec.health.actions.items():
            if action in ("pause", "cancel", "rollback"):
                message.health.actions[rule] = "record"
        message.changes.extend(map(change_to_proto, known.changes))
        message.placement.workers = workers or known.spec.placement.workers
        return self._create(name, message)

    def _upload(self, data: bytes) -> str:
        pieces = [pb.UploadCodeRequest(data=data[i : i + CHUNK_BYTES]) for i in range(0, len(data), CHUNK_BYTES)]
        bundle: pb.CodeBundle = self._call(self._stub.UploadCode, pieces, CREATE_SECONDS)
        return bundle.name

    def check_gradients(
        self,
        task: str,
        *,
        got: str = "own",
        expected: str = "finite",
        tolerance: float = 0.0,
        processes: int = 0,
        say: Callable[[str], None] = lambda text: None,
        arguments: Mapping[str, Any] | None = None,
        **spec: Any,
    ) -> GradientCheck:
        """Compare two ways to a task's gradient in float64, on its first micro-batch. Nothing is trained.

        task, arguments, spec: as of `submit`; no length is needed. got, expected: own (as training computes it),
        forward or finite. tolerance: the largest relative error that passes. processes: that compute, on the hosts of
        the cluster. 0: the service's default. say: called with what is being done.

        Raises SpecError for a task that is refused, or cannot be computed in float64, ConflictError without room.
        """
        length = {} if {"steps", "epochs"} & spec.keys() else {"epochs": 1}
        request = pb.CheckGradientsRequest(
            spec=self._sent(task, arguments, {**spec, **length}),
            got=got,
            expected=expected,
            tolerance=tolerance,
            processes=processes,
        )
        return check_from_proto(self.result(self._stub.CheckGradients(request), say))

    def job(self, name: str) -> Job:
        """A handle for a job by name or id. Asks nothing of the service."""
        return Job(self, name if name.startswith("trainingJobs/") else f"trainingJobs/{name}")

    def list(self, filter: str = "", order_by: str = "") -> Iterator[JobInfo]:  # noqa: A002  # the API's own word
        """Jobs, the newest first unless `order_by` says otherwise: "priority desc, name".

        filter: comparisons of state, owner, priority, create_time, name and labels.KEY, such as 'state = RUNNING AND
        labels.team = "vision"'.

        Raises SpecError for a filter or an order that makes no sense.
        """
        token = ""
        while True:
            request = pb.ListTrainingJobsRequest(page_token=token, filter=filter, order_by=order_by)
            page = self._call(self._stub.ListTrainingJobs, request)
            yield from map(job_from_proto, page.training_jobs)
            token = page.next_page_token
            if not token:
                return

    def server_info(self) -> ServerInfo:
        """What this service is, what its cluster has, and who is asking."""
        return server_info_from_proto(self._call(self._stub.GetServerInfo, pb.GetServerInfoRequest()))

    def _call(self, method: Callable[..., Any], request: Any, timeout: float = CALL_SECONDS) -> Any:
        """One call; one that is made too soon after others is made again, when the service says so."""
        ends = time.monotonic() + timeout
        while True:
            try:
                return method(iter(request) if isinstance(request, list) else request, timeout=timeout)
            except grpc.RpcError as error:
                pause = retry_delay(error)
                if pause is None or time.monotonic() + pause > ends:
                    raise self.translate(error) from None
                time.sleep(pause)

    def result(self, updates: Iterator[Any], say: Callable[[str], None]) -> Any:
        """The last message of an analysis, whose progress is said before it."""
        try:
            for update in updates:
                kind = update.WhichOneof("update")
                if kind != "progress":
                    return getattr(update, kind)
                say(update.progress)
        except grpc.RpcError as error:
            raise self.translate(error) from None
        raise ServiceUnavailableError("the service ended the analysis without a result")

    def translate(self, error: grpc.RpcError) -> SteepestError:
        """The error of this package that a gRPC error stands for."""
        code, message = error.code(), error.details() or ""
        match code:
            case grpc.StatusCode.INVALID_ARGUMENT:
                return SpecError(_violations(error) or [Violation("request", message)])
            case grpc.StatusCode.NOT_FOUND:
                return NotFoundError(message)
            case grpc.StatusCode.ABORTED:
                return ChangedError(message)
            case grpc.StatusCode.OUT_OF_RANGE:
                return OutOfRangeError(message)
            case grpc.StatusCode.FAILED_PRECONDITION:
                return ConflictError(message)
            case grpc.StatusCode.UNAUTHENTICATED:
                return UnauthenticatedError(message)
            case grpc.StatusCode.PERMISSION_DENIED:
                return PermissionDeniedError(message)
            case grpc.StatusCode.RESOURCE_EXHAUSTED if (pause := retry_delay(error)) is not None:
                return TooManyCallsError(message, pause)
            case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED:
                return ServiceUnavailableError(f"the service at {self.address} does not answer: {message}")
        return SteepestError(f"{code.name}: {message}")


def _own_certificate() -> tuple[str, str] | None:
    """What the environment says of the caller's certificate and its key. Raises SpecError for one without the other."""
    names = ("STEEPEST_CLIENT_CERT", "STEEPEST_CLIENT_KEY")
    certificate, key = (os.environ.get(name, "") for name in names)
    if bool(certificate) != bool(key):
        raise SpecError([Violation(names[not certificate], f"is set without {names[not key]}; they come together")])
    return (certificate, key) if certificate else None


def retry_delay(error: grpc.RpcError) -> float | None:
    """Seconds after which the service wants to be asked again; None where it does not say."""
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return float(info.retry_delay.ToNanoseconds() / 1e9)
    return None


def _violations(error: grpc.RpcError) -> list[Violation]:
    status = rpc_status.from_call(error)
    found: list[Violation] = []
    for detail in status.details if status is not None else ():
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            found += [Violation(v.field, v.description) for v in bad.field_violations]
    return found
