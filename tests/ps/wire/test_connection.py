from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import pytest

from ps.job.credentials import Credentials
from ps.wire.address import CHUNK_BYTES
from ps.wire.connection import GREETING, LENGTHS, MAGIC, Connection, Role, StreamError, connect
from ps.wire.listener import Listener, Service
from ps.wire.secure import SecureSocket


class Text:
    """Stands for a protobuf message."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def SerializeToString(self) -> bytes:
        return self.data


def parse(data: bytes) -> Text:
    if data == b"senseless":
        raise ValueError(data)
    return Text(data)


CREDENTIALS = Credentials.create()


@pytest.fixture(params=["unix", "tcp", "tcp6", "tls"])
def listener(request: pytest.FixtureRequest) -> Iterator[tuple[Listener, SimpleQueue[Connection[Text]]]]:
    taken: SimpleQueue[Connection[Text]] = SimpleQueue()
    host = {"unix": None, "tcp6": "::1"}.get(request.param, "127.0.0.1")
    made = Listener({Role.WORKER: Service(parse, taken.put)}, host, CREDENTIALS if request.param == "tls" else None)
    yield made, taken
    made.close()


def _pair(listener: Any) -> tuple[Connection[Text], Connection[Text]]:
    made, taken = listener
    ours = connect(made.address, Role.WORKER, parse, made._credentials)
    return ours, taken.get(timeout=5)


def _stranger(listener: Any) -> socket.socket | SecureSocket:
    made, _ = listener
    host, colon, port = made.address.rpartition(":")
    if colon:
        end = socket.create_connection((host.strip("[]"), int(port)), timeout=5)
        return end if made._credentials is None else SecureSocket(end, made._credentials, server=False)
    end = socket.socket(socket.AF_UNIX)
    end.settimeout(5)
    end.connect("\0" + made.address)
    return end


def test_messages_arrive_whole_and_in_order(listener: Any) -> None:
    ours, theirs = _pair(listener)
    sent = [b"", b"a", b"x" * 70_000, bytes(range(256))]
    for data in sent:
        ours.send(Text(data))
    incoming = iter(theirs)
    assert [next(incoming).data for _ in sent] == sent
    theirs.send(Text(b"back"))
    assert next(iter(ours)).data == b"back"


def test_tensors_land_where_the_receiver_wants_them(listener: Any) -> None:
    ours, theirs = _pair(listener)
    tensors = {str(i).encode(): bytes([i]) * size for i, size in enumerate([1, 100_000, CHUNK_BYTES])}
    memory = {name: bytearray(len(data)) for name, data in tensors.items()}
    theirs.sink = lambda message, num_bytes: memoryview(memory[message.data])[:num_bytes]
    for name, data in tensors.items():
        ours.send(Text(name), memoryview(data))
    ours.send(Text(b"end"))
    incoming = iter(theirs)
    assert [next(incoming).data for _ in range(4)] == [*tensors, b"end"]
    assert memory == tensors


def test_sending_never_blocks_though_nobody_reads(listener: Any) -> None:
    ours, theirs = _pair(listener)
    sent = [bytes([i]) * 100_000 for i in range(100)]
    done = threading.Event()

    def send() -> None:
        for data in sent:
            ours.send(Text(data))
        done.set()

    threading.Thread(target=send, daemon=True).start()
    assert done.wait(5), "send waited for a reader"
    incoming = iter(theirs)
    assert [next(incoming).data for _ in sent] == sent


def test_hanging_up_ends_the_other_side(listener: Any) -> None:
    ours, theirs = _pair(listener)
    ours.send(Text(b"last"))
    ours.close()
    assert [m.data for m in theirs] == [b"last"]
    theirs.send(Text(b"into the void"))


def test_a_link_lost_in_the_middle_of_a_tensor_ends_the_stream_without_its_message(listener: Any) -> None:
    end = _stranger(listener)
    end.sendall(GREETING.pack(MAGIC, Role.WORKER) + LENGTHS.pack(1, 100) + b"x" + b"torn")
    theirs = listener[1].get(timeout=5)
    theirs.sink = lambda message, num_bytes: memoryview(bytearray(num_bytes))
    end.close()
    assert list(theirs) == []


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (LENGTHS.pack(0, CHUNK_BYTES + 1), "too long"),
        (LENGTHS.pack(2**31, 0), "too long"),
        (LENGTHS.pack(9, 0) + b"senseless", "cannot be read"),
        (LENGTHS.pack(1, 4) + b"xdata", "not expected"),
    ],
    ids=["oversized-tensor", "oversized-message", "garbage", "unwanted-tensor"],
)
def test_what_breaks_the_protocol_is_named(listener: Any, frame: bytes, message: str) -> None:
    end = _stranger(listener)
    end.sendall(GREETING.pack(MAGIC, Role.WORKER) + frame)
    with pytest.raises(StreamError, match=message):
        list(listener[1].get(timeout=5))
    end.close()


@pytest.mark.parametrize("greeting", [b"GET / HTTP/1.1\r\n\r\n", GREETING.pack(MAGIC, 9), b"\0" * GREETING.size, b""])
def test_who_does_not_speak_the_protocol_is_turned_away(listener: Any, greeting: bytes) -> None:
    end = _stranger(listener)
    end.sendall(greeting)
    with contextlib.suppress(OSError):  # it may have hung up already
        end.shutdown(socket.SHUT_WR)
        assert end.recv(1) == b""
    assert listener[1].empty()


def test_nobody_listens() -> None:
    with pytest.raises(ConnectionRefusedError):
        connect("steepest-nobody", Role.WORKER, parse)


def test_a_closed_listener_takes_nobody(listener: Any) -> None:
    made, _ = listener
    made.close()
    with pytest.raises(ConnectionRefusedError):
        connect(made.address, Role.WORKER, parse)
