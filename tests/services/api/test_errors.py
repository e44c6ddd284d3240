from __future__ import annotations

import base64
import inspect
import logging
from collections.abc import Iterator
from concurrent import futures
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2
from prometheus_client.registry import CollectorRegistry

from services.api.errors import CATALOGUE, ErrorInterceptor, shortened, status_of
from services.telemetry.calls import CallMetrics
from steepest import errors
from steepest.errors import ConflictError, NotFoundError, SpecError, SteepestError, Violation
from steepest.v1 import training_jobs_pb2 as pb
from steepest.v1 import training_jobs_pb2_grpc as pb_grpc

# Raised by the client when it waited; a service never sends it.
CLIENT_ONLY = {errors.SteepestError, errors.JobFailedError}


def test_the_catalogue_is_complete_and_its_reasons_are_unique() -> None:
    tree = {c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, SteepestError)}
    assert set(CATALOGUE) == tree - CLIENT_ONLY
    assert len({reason for _, reason in CATALOGUE.values()}) == len(CATALOGUE)


def test_a_refused_spec_carries_every_field() -> None:
    status = status_of(SpecError([Violation("optimizer.lr", "too small"), Violation("steps", "missing")]))
    assert status.code == code_pb2.INVALID_ARGUMENT
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert info.reason == "INVALID_SPEC"
    assert status.details[1].Unpack(bad)
    assert [(v.field, v.description) for v in bad.field_violations] == [
        ("optimizer.lr", "too small"),
        ("steps", "missing"),
    ]


def test_who_asks_too_often_is_told_when_to_come_back() -> None:
    status = status_of(errors.TooManyCallsError("not so often", 1.25))
    info = error_details_pb2.RetryInfo()
    assert status.code == code_pb2.RESOURCE_EXHAUSTED
    assert status.details[1].Unpack(info)
    assert (info.retry_delay.seconds, info.retry_delay.nanos) == (1, 250_000_000)


def test_a_long_traceback_fits_the_headers_that_clients_take() -> None:
    text = "the first line\n" + "é\n" * 20_000 + "RuntimeError: the last line"
    status = status_of(SpecError([Violation("task", text), Violation("steps", text)]))
    sent = len(quote(status.message)) + len(base64.b64encode(status.SerializeToString()))
    assert sent < 8000
    bad = error_details_pb2.BadRequest()
    assert status.details[1].Unpack(bad)
    for violation in bad.field_violations:
        assert violation.description.startswith("the first line\n")
        assert violation.description.endswith("RuntimeError: the last line")
    assert shortened("short", 100) == "short"


def test_an_unexpected_error_keeps_its_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        status = status_of(ZeroDivisionError("secret detail"))
    assert status.code == code_pb2.INTERNAL
    assert "secret" not in status.message
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.metadata["reference"] in status.message
    assert info.metadata["reference"] in caplog.text


HANDLED = "grpc_server_handled_total"


class _Broken(pb_grpc.TrainingJobServiceServicer):
    """Fails in ways that no servicer should."""

    def GetTrainingJob(self, request: Any, context: Any) -> Any:
        raise ZeroDivisionError("secret detail")

    def ListTrainingJobs(self, request: Any, context: Any) -> Any:
        raise ConflictError("not now")

    def UploadCode(self, request_iterator: Any, context: Any) -> Any:
        list(request_iterator)
        raise SpecError([Violation("data", "too large")])

    def WatchTrainingJob(self, request: Any, context: Any) -> Any:
        yield pb.WatchTrainingJobResponse()
        raise NotFoundError("it is gone")


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def stub(registry: CollectorRegistry) -> Iterator[pb_grpc.TrainingJobServiceStub]:
    server = grpc.server(futures.ThreadPoolExecutor(2), interceptors=[ErrorInterceptor(CallMetrics(registry))])
    pb_grpc.add_TrainingJobServiceServicer_to_server(_Broken(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield pb_grpc.TrainingJobServiceStub(channel)
    server.stop(None).wait()


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        (lambda s: s.GetTrainingJob(pb.GetTrainingJobRequest()), grpc.StatusCode.INTERNAL, "internal error"),
        (lambda s: s.ListTrainingJobs(pb.ListTrainingJobsRequest()), grpc.StatusCode.FAILED_PRECONDITION, "not now"),
        (lambda s: s.UploadCode(iter([pb.UploadCodeRequest()])), grpc.StatusCode.INVALID_ARGUMENT, "data: too large"),
        (lambda s: list(s.WatchTrainingJob(pb.WatchTrainingJobRequest())), grpc.StatusCode.NOT_FOUND, "it is gone"),
    ],
    ids=["unexpected", "unary", "client stream", "server stream"],
)
def test_the_interceptor_turns_errors_into_statuses(
    stub: Any, registry: CollectorRegistry, call: Any, code: grpc.StatusCode, words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with pytest.raises(grpc.RpcError) as caught:
        call(stub)
    assert caught.value.code() == code
    assert words in caught.value.details()
    assert "secret" not in caught.value.details()
    assert ("secret detail" in caplog.text) == (code == grpc.StatusCode.INTERNAL)
    counted = {s.labels["grpc_code"]: s.value for m in registry.collect() for s in m.samples if s.name == HANDLED}
    assert counted == {code.name: 1.0}
    streams = [s.value for m in registry.collect() for s in m.samples if s.name == "grpc_server_open_streams"]
    assert sum(streams) == 0
