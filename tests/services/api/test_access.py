"""Who may do what over gRPC: every method, every role, with and without TLS, against a real server."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.registry import CollectorRegistry

from services.api.server import GrpcServer
from services.jobs.access import NEEDS, Access, Need, current_caller
from services.jobs.audit import Audit
from services.settings import Settings
from services.store.store import Store
from services.store.tokens import Role
from services.telemetry.calls import CallMetrics
from steepest.channel import open_channel, with_token
from steepest.errors import UnauthenticatedError
from steepest.v1 import training_jobs_pb2 as pb
from steepest.v1 import training_jobs_pb2_grpc as pb_grpc
from tests.support.certificates import certificates
from tests.support.rows import job_row

METHODS = {m.name: m for m in pb.DESCRIPTOR.services_by_name["TrainingJobService"].methods}
CODES = {Need.LOOK: {"viewer", "submitter", "admin"}, Need.SUBMIT: {"submitter", "admin"}, Need.OWN: {"admin"}}
pytestmark = pytest.mark.cluster


class _Answers(pb_grpc.TrainingJobServiceServicer):
    """Answers every call with an empty message. callers: who was known to have made each call, as it was answered."""

    def __init__(self) -> None:
        self.callers: list[tuple[str, str]] = []

    def __getattribute__(self, name: str) -> Any:
        if name not in METHODS:
            return super().__getattribute__(name)
        method = METHODS[name]

        def answer() -> Any:
            self.callers.append((name, current_caller().name))
            return getattr(pb, method.output_type.name)()

        if method.server_streaming:
            return lambda request, context: (answer() for _ in range(2))
        return lambda request, context: answer()


class _Served:
    """A server with the jobs "mine", of the token "me", and "theirs", of the token "them"."""

    def __init__(self, directory: Path, *, tls: bool) -> None:
        self.store = Store(f"sqlite:///{directory / 'steepest.db'}")
        for job, owner in (("mine", "me"), ("theirs", "them"), ("old", "")):
            self.store.create(replace(job_row(job), owner=owner))
        settings = Settings(data_directory=directory, grpc_port=0)
        self.authority: Path | None = None
        if tls:
            self.authority, certificate, key = certificates(directory)
            settings = replace(settings, tls_certificate=certificate, tls_key=key)
        self.server = GrpcServer(
            settings, Access(self.store, Audit(settings.audit_log)), CallMetrics(CollectorRegistry())
        )
        self.answers = _Answers()
        self.server.start(self.answers)  # type: ignore[arg-type]
        self.channels: list[grpc.Channel] = []

    def code(self, method: str, job: str, token: str) -> grpc.StatusCode:
        """What comes of a call."""
        channel = open_channel(f"127.0.0.1:{self.server.port}", self.authority, token)
        self.channels.append(channel)
        stub = pb_grpc.TrainingJobServiceStub(with_token(channel, token))
        described = METHODS[method]
        request = getattr(pb, described.input_type.name)()
        if "name" in described.input_type.fields_by_name:
            request.name = f"trainingJobs/{job}"
        try:
            answer = getattr(stub, method)(iter([request]) if described.client_streaming else request, timeout=10)
            if described.server_streaming:
                list(answer)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
        return grpc.StatusCode.OK

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        self.server.stop()
        self.store.close()


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[_Served]:
    found = _Served(tmp_path, tls=request.param)
    yield found
    found.close()


def test_every_method_has_its_need() -> None:
    assert NEEDS.keys() == METHODS.keys()
    for name, need in NEEDS.items():
        if need is Need.OWN:
            assert "name" in METHODS[name].input_type.fields_by_name


def test_the_matrix(served: _Served) -> None:
    for method in METHODS:
        assert served.code(method, "theirs", "") == grpc.StatusCode.OK, "no token is needed while there is none"
    tokens = {
        role: served.store.tokens.create(name, role, 0.0) for name, role in (("me", "submitter"), ("v", "viewer"))
    }
    tokens["admin"] = served.store.tokens.create("root", "admin", 0.0)
    for method, job in itertools.product(METHODS, ("mine", "theirs", "old")):
        need = NEEDS[method]
        assert served.code(method, job, "") == grpc.StatusCode.UNAUTHENTICATED
        assert served.code(method, job, "steepest_wrong") == grpc.StatusCode.UNAUTHENTICATED
        for role in Role:
            may = role in CODES[need] or (need is Need.OWN and role == "submitter" and job == "mine")
            expected = grpc.StatusCode.OK if may else grpc.StatusCode.PERMISSION_DENIED
            assert served.code(method, job, tokens[role]) == expected, (method, job, role)
    served.store.tokens.revoke("me", 1.0)
    assert served.code("GetTrainingJob", "mine", tokens["submitter"]) == grpc.StatusCode.UNAUTHENTICATED


def test_who_calls_is_known_for_as_long_as_the_answer_takes(served: _Served) -> None:
    token = served.store.tokens.create("root", "admin", 0.0)
    for method in METHODS:
        assert served.code(method, "mine", token) == grpc.StatusCode.OK
    assert {caller for _, caller in served.answers.callers} == {"root"}
    assert {method for method, _ in served.answers.callers} == METHODS.keys()
    assert sum(method == "CheckGradients" for method, _ in served.answers.callers) == 2


def test_a_revoked_token_does_not_open_the_service_again(tmp_path: Path) -> None:
    served = _Served(tmp_path, tls=False)
    served.store.tokens.create("root", "admin", 0.0)
    served.store.tokens.revoke("root", 1.0)
    assert served.code("ListTrainingJobs", "", "") == grpc.StatusCode.UNAUTHENTICATED
    served.close()


def test_only_a_hash_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "steepest.db"
    store = Store(f"sqlite:///{path}")
    token = store.tokens.create("me", "viewer", 0.0)
    store.close()
    files = list(tmp_path.iterdir())
    assert any(b"viewer" in file.read_bytes() for file in files)
    assert all(token.encode() not in file.read_bytes() for file in files)


def test_a_token_may_expire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"sqlite:///{tmp_path / 'jobs.db'}")
    token = store.tokens.create("me", "viewer", 0.0, expires=1000.0)
    access = Access(store, Audit(tmp_path / "audit.jsonl"))
    monkeypatch.setattr("services.store.tokens.time.time", lambda: 999.0)
    assert access.caller(f"Bearer {token}", "192.0.2.7:1").name == "me"
    monkeypatch.setattr("services.store.tokens.time.time", lambda: 1000.0)
    with pytest.raises(UnauthenticatedError, match="has expired"):
        access.caller(f"Bearer {token}", "192.0.2.7:1")
    assert [(row.name, row.expires, row.revoked) for row in store.tokens.all()] == [("me", 1000.0, None)]
    store.close()


def test_who_changes_something_is_noted(tmp_path: Path) -> None:
    served = _Served(tmp_path, tls=False)
    token = served.store.tokens.create("me", "submitter", 0.0)
    for method, job, shown in (
        ("CancelTrainingJob", "mine", token),
        ("GetTrainingJob", "mine", token),
        ("PauseTrainingJob", "theirs", token),
        ("ListTrainingJobs", "", "steepest_wrong"),
        ("UploadCode", "", token),
    ):
        served.code(method, job, shown)
    served.close()
    found = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(line["caller"], line["method"], line["target"], line["outcome"]) for line in found] == [
        ("me", "CancelTrainingJob", "trainingJobs/mine", "ok"),
        ("me", "PauseTrainingJob", "trainingJobs/theirs", "PermissionDenied"),
        ("", "ListTrainingJobs", "", "Unauthenticated"),
        ("me", "UploadCode", "", "ok"),
    ]
    assert all(line["peer"].startswith("ipv4:127.0.0.1:") for line in found)
    assert token not in (tmp_path / "audit.jsonl").read_text()
