"""A service that lets a caller ask only so often: its refusals, and a client that waits."""

from __future__ import annotations

import http.client
import time
from pathlib import Path

import grpc
import pytest

from steepest.client import Client, retry_delay
from steepest.v1 import training_jobs_pb2 as pb
from steepest.v1 import training_jobs_pb2_grpc as pb_grpc
from tests.support.documented import is_documented
from tests.support.service import free_port, serving

pytestmark = pytest.mark.cluster

RATE, BURST = 4, 20


def test_who_asks_too_often_waits(tmp_path: Path) -> None:
    port = free_port()
    options = ("--cpus", "1", "--calls-per-second", str(RATE), "--http-port", str(port))
    with serving(tmp_path / "data", *options) as address:
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.TrainingJobServiceStub(channel)  # type: ignore[no-untyped-call]

            def ask_often() -> None:
                for _ in range(2 * BURST):
                    stub.ListTrainingJobs(pb.ListTrainingJobsRequest())

            with pytest.raises(grpc.RpcError) as refused:
                ask_often()
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert is_documented("somebody asks too often", refused.value.details() or "")
        assert retry_delay(refused.value) == 1.0
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/api/jobs")
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("Retry-After")) == (429, "1")
        assert b"asks more than 4 times a second" in answer.read()
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
        began = time.monotonic()
        with Client(address) as client:
            assert client.server_info().calls_per_second == RATE
            for _ in range(BURST // 2):
                assert list(client.list()) == []
        assert time.monotonic() - began > 1.0
