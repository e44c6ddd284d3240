"""Requests that make no sense, many of them: each gets a refusal, none a traceback, and the service goes on.

STEEPEST_FUZZ is how many there are of each kind (300); what is drawn comes from STEEPEST_FUZZ_SEED (0).
"""

from __future__ import annotations

import copy
import http.client
import io
import json
import os
import random
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from harness.local_job import hashes, job_config, running
from services.service import Service
from steepest.client import Client
from steepest.spec_fields import describe_fields
from steepest.v1 import training_jobs_pb2 as pb

pytestmark = pytest.mark.cluster
COUNT = int(os.environ.get("STEEPEST_FUZZ", "300"))
SEED = int(os.environ.get("STEEPEST_FUZZ_SEED", "0"))
SERVICE = "/steepest.v1.TrainingJobService/"
METHODS = {m.name: m for m in pb.DESCRIPTOR.services_by_name["TrainingJobService"].methods}
SECONDS = 20.0
WORDS = (
    "", "0", "-1", "null", "NaN", "1e999", "trainingJobs/", "trainingJobs/x", "../../etc/passwd", "\x00", "a" * 5000,
    "é" * 70, "' OR 1=1 --", '"', "state = ", "labels. = x", "labels.a = \x00", "create_time > 2026-99-99",
    "name desc, name desc", "{}", "[[[[", "\ud7ff\U0010ffff", "%s%n", "<script>", "codeBundles/",
    "codeBundles/" + "0" * 64, "[" * 3000, '{"a":' * 2000,
)  # fmt: skip
NUMBERS = (0, 1, -1, 2**31 - 1, -(2**31), 2**53, 2**63 - 1, -(2**63), 7)
REALS = (0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), float("-inf"), 5e-324, 1.8e308)


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture(scope="module")
def channel(service: Service) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{service.grpc_port}") as opened:
        yield opened


def _bytes(draw: random.Random) -> bytes:
    return draw.randbytes(draw.choice((0, 1, 3, 20, 200)))


def _value(draw: random.Random, field: FieldDescriptor) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return _bytes(draw) if field.type == FieldDescriptor.TYPE_BYTES else draw.choice(WORDS)
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return draw.choice(REALS)
        case FieldDescriptor.CPPTYPE_BOOL:
            return draw.random() < 0.5
        case FieldDescriptor.CPPTYPE_INT32 | FieldDescriptor.CPPTYPE_ENUM:
            return draw.choice([number for number in NUMBERS if -(2**31) <= number < 2**31])
        case _:
            return draw.choice(NUMBERS)


def _fill(draw: random.Random, message: Message, depth: int = 0) -> None:
    """Set some fields to values that are of the right type."""
    for field in message.DESCRIPTOR.fields:
        if draw.random() < (0.5 if depth == 0 else 0.8):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
            for _ in range(draw.randint(1, 3)):
                getattr(message, field.name)[_value(draw, key)] = _value(draw, value)
        elif field.message_type is not None and field.is_repeated:
            _fill(draw, getattr(message, field.name).add(), depth + 1)
        elif field.message_type is not None:
            getattr(message, field.name).SetInParent()
            _fill(draw, getattr(message, field.name), depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(_value(draw, field) for _ in range(draw.randint(1, 3)))
        else:
            setattr(message, field.name, _value(draw, field))


def _call(channel: grpc.Channel, name: str, requests: list[bytes], metadata: Any = ()) -> grpc.StatusCode:
    """The status of a call; of a stream, of its first answer."""
    method = METHODS[name]
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    stub = getattr(channel, kind)(SERVICE + name, request_serializer=bytes, response_deserializer=bytes)
    given: Any = iter(requests) if method.client_streaming else requests[0]
    try:
        answer = stub(given, timeout=SECONDS, metadata=metadata)
        if method.server_streaming:
            next(iter(answer), None)
            answer.cancel()
    except grpc.RpcError as error:
        said = error.details() or ""
        assert "Traceback" not in said, said
        code = error.code()
        assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), (name, requests, said)
        return code
    return grpc.StatusCode.OK


def test_messages_of_any_kind(channel: grpc.Channel, client: Client, draw: random.Random) -> None:
    """Fields of the right types with values that are not, and bytes that are no message at all."""
    names = [name for name in METHODS if name != "MeasureCurvature"]  # one at a time, and slow
    codes = set()
    for _ in range(COUNT):
        name = draw.choice(names)
        message = getattr(pb, METHODS[name].input_type.name)()
        _fill(draw, message)
        if name in ("CreateTrainingJob", "CheckGradients"):  # both are refused, after all the rest is looked at
            message.spec.steps, message.spec.epochs = 1, 1
        raw = message.SerializeToString()
        if draw.random() < 0.3:
            raw = _mangled(draw, raw)
        codes.add(_call(channel, name, [raw]))
    assert codes >= {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND} or COUNT < 100
    assert client.server_info().not_ready == ""


def _mangled(draw: random.Random, raw: bytes) -> bytes:
    data = bytearray(raw or b"\x00")
    for _ in range(draw.randint(1, 8)):
        match draw.randrange(3):
            case 0:
                data[draw.randrange(len(data))] = draw.randrange(256)
            case 1:
                at = draw.randrange(len(data) + 1)
                data[at:at] = _bytes(draw)
            case _ if len(data) > 1:
                del data[draw.randrange(len(data))]
    return bytes(data)


def test_specs_with_one_field_that_makes_no_sense(channel: grpc.Channel, draw: random.Random) -> None:
    """Around a spec that is right but for its task, which is not there."""
    base = pb.TrainingJobSpec(steps=3)
    base.task.module, base.task.function = "nowhere_to_be_found", "task"
    paths = [info.path for info in describe_fields()]
    for _ in range(COUNT):
        spec = copy.deepcopy(base)
        spec.optimizer.name = draw.choice(["adamw", "sgd", "muon", "lbfgs", "x:Y", ""])
        spec.steps = draw.choice([-1, 0])
        target, path = spec, draw.choice(paths).split(".")
        for part in path[:-1]:
            field = target.DESCRIPTOR.fields_by_name.get(part)
            if field is None or field.message_type is None or field.is_repeated:
                break
            target = getattr(target, part)
        _fill(draw, target, 1)
        spec.steps = draw.choice([-1, 0])
        raw = pb.CreateTrainingJobRequest(spec=spec, request_id=draw.choice(WORDS)[:100]).SerializeToString()
        assert _call(channel, "CreateTrainingJob", [raw]) == grpc.StatusCode.INVALID_ARGUMENT


def test_tokens_of_any_kind(channel: grpc.Channel, draw: random.Random) -> None:
    letters = [chr(code) for code in range(32, 127)]
    for _ in range(COUNT):
        said = "".join(draw.choices(letters, k=draw.choice((0, 1, 10, 100, 1000))))
        value = draw.choice(("Bearer ", "bearer ", "", "Basic ")) + said
        code = _call(channel, "GetServerInfo", [b""], [("authorization", value)])
        assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED)


def test_archives_of_any_kind(channel: grpc.Channel, service: Service, draw: random.Random) -> None:
    """Uploads that are no archives, or archives with names and entries that would leave their folder."""
    names = (
        "a.py",
        "../a.py",
        "/etc/a.py",
        "a/../../b.py",
        "services/x.py",
        "\x01.py",
        "C:\\a.py",
        "a" * 300,
        "./a.py",
        "",
    )
    for index in range(COUNT):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name in draw.sample(names, draw.randint(0, 3)):
                info = zipfile.ZipInfo(name)
                info.external_attr = draw.choice((0, 0o120777 << 16, 0o644 << 16, 0o010644 << 16))
                with_data = draw.choice((b"", b"x = 1\n", b"../../../etc/passwd", bytes(1000)))
                archive.writestr(info, with_data, draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
        data = buffer.getvalue()
        if draw.random() < 0.7:
            data = _mangled(draw, data)
        pieces = [
            pb.UploadCodeRequest(data=data[:7]).SerializeToString(),
            pb.UploadCodeRequest(data=data[7:]).SerializeToString(),
        ]
        if draw.random() < 0.2:
            pieces.append(_mangled(draw, pieces[0]))
        code = _call(channel, "UploadCode", pieces)
        assert code in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT)
        if code == grpc.StatusCode.OK and index % 20 == 0:  # and it is unpacked
            spec = pb.TrainingJobSpec(steps=1)
            spec.task.module, spec.task.function = "nowhere_to_be_found", "task"
            spec.task.code_bundle = _uploaded(channel, pieces)
            raw = pb.CreateTrainingJobRequest(spec=spec).SerializeToString()
            assert _call(channel, "CreateTrainingJob", [raw]) == grpc.StatusCode.INVALID_ARGUMENT
    outside = {path.name for path in service.settings.data_directory.iterdir()}
    assert not {"a.py", "b.py"} & (outside | {path.name for path in Path("/etc").iterdir()})


def _uploaded(channel: grpc.Channel, pieces: list[bytes]) -> str:
    stub = channel.stream_unary(
        SERVICE + "UploadCode", request_serializer=bytes, response_deserializer=pb.CodeBundle.FromString
    )
    return str(stub(iter(pieces)).name)


def test_http_requests_of_any_kind(service: Service, draw: random.Random) -> None:
    paths = (
        "/", "/jobs/x", "/metrics", "/healthz", "/readyz", "/api/jobs", "/api/jobs/x", "/api/jobs/x/series",
        "/api/jobs/x/layers", "/api/jobs/x/noise", "/api/jobs/x/curvature", "/api/jobs/x/histograms",
        "/api/jobs/x/pause", "/api/jobs/x/scale", "/api/sign-in", "/static/job.js", "/static/../views.py",
        "/static/%2e%2e/views.py", "/api/session", "//",
        "/api/jobs/%00", "/api/jobs/..%2f..",
    )  # fmt: skip
    own = {
        "X-Steepest": "page", "Origin": f"http://127.0.0.1:{service.http_port}", "Cookie": "steepest=x",
        "Authorization": "Bearer x", "Content-Type": "application/json",
    }  # fmt: skip
    keys = ("first", "last", "points", "names", "name", "signal", "cursor", "x")
    for _ in range(COUNT):
        query = "&".join(f"{draw.choice(keys)}={_quoted(draw)}" for _ in range(draw.randint(0, 3)))
        path = draw.choice(paths) + (f"?{query}" if query else "")
        method = draw.choice(("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "X"))
        body = draw.choice((b"", b"{}", b"null", b'{"workers": -1}', b'{"token": 7}', b"[" * 5000, _bytes(draw)))
        headers = {
            name: draw.choice((right, "x", "http://elsewhere.example", "a" * 3000))
            for name, right in own.items()
            if draw.random() < 0.4
        }
        connection = http.client.HTTPConnection("127.0.0.1", service.http_port, timeout=SECONDS)
        connection.request(method, path, body if method not in ("GET", "HEAD") else None, headers)
        answer = connection.getresponse()
        said = answer.read()
        connection.close()
        assert answer.status < 500, (method, path, body, headers, said[:300])
        # What is found may tell a job's own error, which is the traceback of its code.
        assert answer.status < 400 or b"Traceback" not in said


def _quoted(draw: random.Random) -> str:
    raw = draw.choice((*WORDS[:20], "loss", "0:0:0", "1e3", "9" * 30)).encode()[:300]
    return "".join(f"%{byte:02x}" for byte in raw)


def test_raw_bytes_to_the_page(service: Service, draw: random.Random) -> None:
    for _ in range(COUNT // 10):
        with socket.create_connection(("127.0.0.1", service.http_port), timeout=SECONDS) as connection:
            connection.sendall(_mangled(draw, b"GET /api/jobs HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
            connection.shutdown(socket.SHUT_WR)
            said = b""
            while piece := connection.recv(1 << 16):
                said += piece
            assert b"Traceback" not in said
            assert b" 500 " not in said.split(b"\r\n")[0]


def test_frames_of_any_kind_to_the_servers_of_a_job(tmp_path: Path, draw: random.Random) -> None:
    """Its parameters come out as those of a job that nobody bothers."""
    spec: dict[str, Any] = {
        "steps": 150,
        "placement": {"workers": 2, "servers": 2},
        "data": {"global_batch": 16, "micro_batch": 4, "drop_last": True},
    }
    found = []
    for bothered in (False, True):
        config = job_config(tmp_path / str(bothered), "tests.support.tasks:slow", arguments={"delay": 0.002}, **spec)
        with running(config, 2) as job:
            if bothered:
                _bother(draw, [address for server in job.addresses for address in _sockets(server)])
            found.append(hashes(job.finish()))
    assert found[0] == found[1]


def _sockets(address: Any) -> list[Callable[[], socket.socket]]:
    """How to call a server."""
    made: list[Callable[[], socket.socket]] = []
    for value in (getattr(address, name) for name in address.__slots__ if hasattr(address, name)):
        if isinstance(value, str) and value.startswith("steepest-"):
            made.append(lambda value=value: _unix(value))
        elif isinstance(value, str) and value.rpartition(":")[2].isdigit():
            host, _, port = value.rpartition(":")
            made.append(lambda host=host, port=port: socket.create_connection((host, int(port))))
    return made


def _unix(name: str) -> socket.socket:
    opened = socket.socket(socket.AF_UNIX)
    opened.connect("\0" + name)
    return opened


def _bother(draw: random.Random, calls: list[Callable[[], socket.socket]]) -> None:
    assert calls
    from ps.wire.connection import GREETING, MAGIC, Role

    for index in range(COUNT // 3):
        with draw.choice(calls)() as connection:
            greeting = GREETING.pack(MAGIC, draw.choice(list(Role)))
            start = greeting if index % 2 else _mangled(draw, greeting)
            try:
                connection.sendall(start + b"".join(_bytes(draw) for _ in range(draw.randint(0, 5))))
            except OSError:
                continue  # it has hung up already


def test_nothing_of_this_left_a_job_behind(client: Client) -> None:
    assert json.dumps(client.server_info().to_dict())
    assert [info for info in client.list() if "nowhere_to_be_found" in str(info.spec.task)] == []
