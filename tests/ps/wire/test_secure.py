"""TLS between hosts: both ways at once, nothing in clear, nobody without the job's credentials."""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import ssl
import threading
from collections.abc import Iterator
from queue import Empty, SimpleQueue

import pytest

from ps.job.credentials import Credentials
from ps.wire.connection import GREETING, MAGIC, Connection, Role, connect
from ps.wire.hub import Hub
from ps.wire.listener import Listener, Service
from ps.wire.secure import PIECE_BYTES, SecureSocket
from tests.ps.wire.test_connection import Text, parse

OURS, OTHERS = Credentials.create(), Credentials.create()
SIZES = (0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 << 20)


@pytest.fixture
def listener() -> Iterator[tuple[Listener, SimpleQueue[Connection[Text]]]]:
    taken: SimpleQueue[Connection[Text]] = SimpleQueue()
    made = Listener({Role.WORKER: Service(parse, taken.put)}, "127.0.0.1", OURS)
    yield made, taken
    made.close()


def _pass(sender: Connection[Text], data: list[bytes]) -> None:
    for part in data:
        sender.send(Text(b"t"), memoryview(part))


def _digest(receiver: Connection[Text], count: int) -> str:
    """Of the tensors of so many messages."""
    room, found = bytearray(max(SIZES)), hashlib.sha256()
    sizes: list[int] = []

    def sink(message: Text, num_bytes: int) -> memoryview:
        sizes.append(num_bytes)
        return memoryview(room)[:num_bytes]

    receiver.sink = sink
    for _ in range(count):
        sizes.append(0)
        assert receiver.receive() is not None
        found.update(room[: sizes[-1]])
    return found.hexdigest()


def test_large_tensors_go_both_ways_at_once(listener: tuple[Listener, SimpleQueue[Connection[Text]]]) -> None:
    draw = random.Random(0)
    data = [draw.randbytes(size) for size in SIZES * 3]
    ours = connect(listener[0].address, Role.WORKER, parse, OURS)
    theirs = listener[1].get(timeout=5)
    theirs.trust()
    digests: dict[str, str] = {}
    threads = [threading.Thread(target=_pass, args=(end, data)) for end in (ours, theirs)]
    threads += [
        threading.Thread(target=lambda name, end: digests.update({name: _digest(end, len(data))}), args=each)
        for each in (("ours", ours), ("theirs", theirs))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    whole = hashlib.sha256(b"".join(data)).hexdigest()
    assert digests == {"ours": whole, "theirs": whole}


def test_nothing_goes_over_the_network_in_clear(listener: tuple[Listener, SimpleQueue[Connection[Text]]]) -> None:
    host, _, port = listener[0].address.rpartition(":")
    seen = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as between:

        def forward(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    seen.extend(data)
                    target.sendall(data)

        def stand_between() -> None:
            caller, _ = between.accept()
            called = socket.create_connection((host, int(port)))
            for pair in ((caller, called), (called, caller)):
                threading.Thread(target=forward, args=pair, daemon=True).start()

        threading.Thread(target=stand_between, daemon=True).start()
        ours = connect(f"127.0.0.1:{between.getsockname()[1]}", Role.WORKER, parse, OURS)
        theirs = listener[1].get(timeout=5)
        ours.send(Text(b"the token of a job"))
        assert next(iter(theirs)).data == b"the token of a job"
    assert len(seen) > 500
    assert b"token" not in seen
    assert GREETING.pack(MAGIC, Role.WORKER) not in seen


def test_who_has_no_credentials_is_turned_away(listener: tuple[Listener, SimpleQueue[Connection[Text]]]) -> None:
    address = listener[0].address
    with contextlib.suppress(OSError):
        connect(address, Role.WORKER, parse).send(Text(b"in clear"))
    with pytest.raises(ssl.SSLError, match="certificate verify failed"):
        connect(address, Role.WORKER, parse, OTHERS)
    # One who checks nothing and shows nothing gets through its own handshake, as TLS 1.3 has it, and no further.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), context.wrap_socket(socket.create_connection((host, int(port)))) as end:
        end.sendall(GREETING.pack(MAGIC, Role.WORKER))
        assert end.recv(1) == b""
    with pytest.raises(Empty):
        listener[1].get(timeout=0.2)
    ours = connect(address, Role.WORKER, parse, OURS)
    ours.send(Text(b"it goes on"))
    assert next(iter(listener[1].get(timeout=5))).data == b"it goes on"


def test_credentials_do_not_show() -> None:
    assert "PRIVATE" not in repr(OURS)
    assert OURS != OTHERS


def test_a_hub_finds_what_one_record_brought(listener: tuple[Listener, SimpleQueue[Connection[Text]]]) -> None:
    ours = connect(listener[0].address, Role.WORKER, parse, OURS)
    theirs = listener[1].get(timeout=5)
    theirs.trust()
    got: SimpleQueue[bytes] = SimpleQueue()
    hub = Hub()
    hub.add(theirs, lambda message: got.put(message.data), lambda error: got.put(str(error).encode()))
    sent = [bytes([i]) * (1 + 700 * i) for i in range(200)]  # more than one buffer of either end holds
    for data in sent:
        ours.send(Text(data))
    assert [got.get(timeout=5) for _ in sent] == sent
    assert isinstance(ours._socket, SecureSocket)
    ours.close()
    assert got.get(timeout=5) is not None
    hub.close()
