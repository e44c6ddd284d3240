"""The catalogue from errors to gRPC statuses with stable reasons, and the interceptor that uses it."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from services.telemetry.calls import CallMetrics
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

log = logging.getLogger(__name__)

DOMAIN = "steepest"
# A status travels in headers, and clients take 8 KiB of them: the message, in which every line break and letter beyond
# ASCII takes three bytes, again inside the details, which are in base 64.
MAX_SAID_BYTES, MAX_DETAILS_BYTES, MAX_VIOLATIONS, MAX_FIELD_BYTES = 700, 3000, 50, 60

CATALOGUE: dict[type[SteepestError], tuple[int, str]] = {
    SpecError: (code_pb2.INVALID_ARGUMENT, "INVALID_SPEC"),
    NotFoundError: (code_pb2.NOT_FOUND, "NOT_FOUND"),
    ChangedError: (code_pb2.ABORTED, "CHANGED"),
    ConflictError: (code_pb2.FAILED_PRECONDITION, "CONFLICT"),
    ServiceUnavailableError: (code_pb2.UNAVAILABLE, "UNAVAILABLE"),
    OutOfRangeError: (code_pb2.OUT_OF_RANGE, "OUT_OF_RANGE"),
    UnauthenticatedError: (code_pb2.UNAUTHENTICATED, "TOKEN_NEEDED"),
    PermissionDeniedError: (code_pb2.PERMISSION_DENIED, "NOT_ALLOWED"),
    TooManyCallsError: (code_pb2.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS"),
}


def status_of(error: Exception) -> status_pb2.Status:
    """The status for an error. An unexpected one becomes INTERNAL with a reference into the log."""
    for kind, (code, reason) in CATALOGUE.items():
        if isinstance(error, kind):
            details = [error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)]
            if isinstance(error, SpecError):
                shown = error.violations[:MAX_VIOLATIONS]
                most = MAX_DETAILS_BYTES // max(len(shown), 1)
                violations = [_violation(each, most) for each in shown]
                details.append(error_details_pb2.BadRequest(field_violations=violations))
            if isinstance(error, TooManyCallsError):
                pause = duration_pb2.Duration()
                pause.FromNanoseconds(round(error.retry_seconds * 1e9))
                details.append(error_details_pb2.RetryInfo(retry_delay=pause))
            message = shortened(str(error), MAX_SAID_BYTES)
            return status_pb2.Status(code=code, message=message, details=[_packed(d) for d in details])
    reference = secrets.token_hex(4)
    log.error("internal error %s", reference, exc_info=error)
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"reference": reference})
    return status_pb2.Status(
        code=code_pb2.INTERNAL,
        message=f"internal error; the service's log has it as {reference}",
        details=[_packed(info)],
    )


def _violation(violation: Violation, most: int) -> error_details_pb2.BadRequest.FieldViolation:
    """most: bytes of both its texts."""
    field = shortened(violation.field, min(MAX_FIELD_BYTES, most // 2))
    problem = shortened(violation.problem, most - len(field.encode()))
    return error_details_pb2.BadRequest.FieldViolation(field=field, description=problem)


def shortened(text: str, most: int) -> str:
    """At most so many bytes in UTF-8: the beginning and, as of a traceback, rather more of the end."""
    data = text.encode()
    if len(data) <= most:
        return text
    gap = "\n[...]\n"
    head = most // 3
    tail = most - head - len(gap)
    return data[:head].decode(errors="ignore") + gap + data[-tail:].decode(errors="ignore")


def _packed(detail: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


class ErrorInterceptor(grpc.ServerInterceptor):
    """Turns exceptions of the servicers into statuses, and counts them."""

    def __init__(self, metrics: CallMetrics) -> None:
        self._metrics = metrics

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        """Wrap the handler, whichever kind it is."""
        handler = continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/steepest."):
            return handler
        method = handler_call_details.method.rpartition("/")[2]
        readable = _whole if handler.request_streaming else _checked
        wrapped = rewrapped(
            handler,
            lambda behaviour: self._metrics.single(method, _single(behaviour, readable)),
            lambda behaviour: self._metrics.stream(method, _stream(behaviour, readable)),
        )
        return wrapped._replace(request_deserializer=_tolerant(handler.request_deserializer))


def rewrapped(handler: Any, single: Callable[..., Any], stream: Callable[..., Any]) -> Any:
    """A handler with its behaviour wrapped. single, stream: wrap one that returns one answer, or yields many."""
    if handler.response_streaming:
        wrapped = stream(handler.stream_stream or handler.unary_stream)
        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
    else:
        wrapped = single(handler.stream_unary or handler.unary_unary)
        make = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
    return make(wrapped, handler.request_deserializer, handler.response_serializer)


class _Malformed(NamedTuple):
    """In the place of a request that cannot be read. gRPC itself would call that an internal error of the service."""

    problem: str


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return _Malformed(str(error))

    return read


def _checked(request: Any) -> Any:
    """A request that can be read. Raises SpecError."""
    if isinstance(request, _Malformed):
        raise SpecError([Violation("request", f"is no message of this method: {request.problem}")])
    return request


def _whole(requests: Iterable[Any]) -> Iterator[Any]:
    return map(_checked, requests)


def _single(behaviour: Callable[..., Any], readable: Callable[[Any], Any]) -> Callable[..., Any]:
    def call(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return behaviour(readable(request), context)
        except Exception as error:
            context.abort_with_status(rpc_status.to_status(status_of(error)))

    return call


def _stream(behaviour: Callable[..., Any], readable: Callable[[Any], Any]) -> Callable[..., Any]:
    def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from behaviour(readable(request), context)
        except Exception as error:
            context.abort_with_status(rpc_status.to_status(status_of(error)))

    return call
