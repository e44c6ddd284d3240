"""Streams of messages and raw tensors between the processes of a job: over a Unix socket on one host, else over TCP.

A caller begins with a greeting: a magic word and what it is. Then both sides send frames: two
lengths (4 bytes each, little-endian), a protobuf message, and the bytes of a tensor, if any. Those go from the memory
they lie in to the socket, and from the socket to the memory they are for, without a copy in between.

Over TCP all of it may be under TLS; see ps.wire.secure. Unix sockets live in Linux's abstract namespace: nothing is
left on disk, and a process on another host finds no such name.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any, Generic, Protocol, TypeVar

from ps.job.credentials import Credentials
from ps.wire.address import CHUNK_BYTES, ServerAddress
from ps.wire.secure import SecureSocket

log = logging.getLogger(__name__)

MAGIC = b"steepest"
GREETING = struct.Struct("<8sI")
LENGTHS = struct.Struct("<II")
MAX_MESSAGE_BYTES = 1 << 30  # a model's buffers travel in messages
FIRST_MESSAGE_BYTES = 1 << 20  # of a caller that nobody knows yet
BUFFER_BYTES = 1 << 16
LINGER_SECONDS = 2.0
HANDSHAKE_SECONDS = 10.0
# A host that is gone without a word is found out after about 25 s.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}

Received = TypeVar("Received")


class StreamError(Exception):
    """What came in is not what the protocol allows. The message says what."""


class HungUpError(Exception):
    """The other end is gone, or this one was closed."""


class Role(IntEnum):
    """What a caller is to the one it calls."""

    WORKER = 1
    FOLLOWER = 2
    RELAY = 3


class Message(Protocol):
    """A protobuf message, as far as it matters here."""

    def SerializeToString(self) -> bytes:  # noqa: N802  # protobuf's name
        """Its bytes."""


class Connection(Generic[Received]):
    """One end. Iterating gives what the other end sends, until it hangs up; StreamError when that breaks the protocol.

    parse: reads a message from its bytes. sink: returns the memory for a message's tensor, given the message and the
    tensor's size in bytes; it raises StreamError to refuse the tensor. Until it is set, every tensor is refused.
    max_bytes: of a message, until `trust`.
    """

    def __init__(
        self, end: socket.socket | SecureSocket, parse: Callable[[bytes], Received], max_bytes: int = MAX_MESSAGE_BYTES
    ) -> None:
        self._max_bytes = max_bytes
        self.sink: Callable[[Received, int], memoryview] = no_tensors
        self.is_local = end.family == socket.AF_UNIX
        self._socket = end
        self._parse = parse
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._start = self._stop = 0  # of what has come in and is not read yet
        self._lock = threading.Condition()
        self._backlog: deque[memoryview] = deque()
        self._drains = False
        self._closed = False

    def fileno(self) -> int:
        """Of the socket."""
        return self._socket.fileno()

    @property
    def is_empty(self) -> bool:
        """Whether nothing that came in is left to read."""
        if isinstance(self._socket, SecureSocket) and self._socket.holds_data:
            return False
        return self._start == self._stop

    def trust(self) -> None:
        """The other end has shown who it is: it may send what it likes, whenever it likes."""
        self._max_bytes = MAX_MESSAGE_BYTES
        self._socket.settimeout(None)

    def send(self, message: Message, tensor: memoryview | None = None) -> None:
        """Send, and never block: what the socket does not take at once, a thread of its own sends in its time.

        tensor: bytes to follow the message; they must stay as they are until the other end has answered.
        A broken connection swallows messages; its reader gets the error.
        """
        data = message.SerializeToString()
        parts = [memoryview(LENGTHS.pack(len(data), 0 if tensor is None else len(tensor)) + data)]
        if tensor is not None and len(tensor):
            parts.append(tensor)
        with self._lock:
            if not self._backlog:
                try:
                    sent = self._socket.sendmsg(parts, (), socket.MSG_DONTWAIT)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    return
                while parts and sent >= len(parts[0]):
                    sent -= len(parts.pop(0))
                if not parts:
                    return
                parts[0] = parts[0][sent:]
            self._backlog.extend(parts)
            if not self._drains:
                self._drains = True
                threading.Thread(target=self._drain, daemon=True).start()
            self._lock.notify()

    def _drain(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._backlog or self._closed)
                if not self._backlog:
                    return
                part = self._backlog[0]
            try:
                self._socket.sendall(part)
            except OSError:
                return
            with self._lock:
                self._backlog.popleft()
            del part  # it may be large, and the next one long in coming

    def __iter__(self) -> Iterator[Received]:
        while (message := self.next_message()) is not None:
            yield message
        self.release()

    def next_message(self) -> Received | None:
        """The next message, None when the other end is gone. Raises StreamError for what breaks the protocol."""
        try:
            return self.receive()
        except HungUpError:
            return None

    def receive(self, *, wait: bool = True) -> Received | None:
        """The next message, its tensor in place. wait: False gives None when none is there as a whole.

        Raises HungUpError at the end, StreamError for what breaks the protocol.
        """
        while self._stop - self._start < LENGTHS.size:
            if not self._fill(wait):
                return None
        length, tensor_bytes = LENGTHS.unpack_from(self._buffer, self._start)
        if length > self._max_bytes or tensor_bytes > CHUNK_BYTES:
            raise StreamError(f"a message of {length} bytes with a tensor of {tensor_bytes} is too long")
        end = LENGTHS.size + length
        if end > len(self._buffer):
            larger = memoryview(bytearray(end))
            larger[: self._stop - self._start] = self._buffer[self._start : self._stop]
            self._buffer, self._start, self._stop = larger, 0, self._stop - self._start
        while self._stop - self._start < end:
            if not self._fill(wait):
                return None
        data = bytes(self._buffer[self._start + LENGTHS.size : self._start + end])
        self._start += end
        try:
            message = self._parse(data)
        except Exception as error:
            raise StreamError(f"a message of {length} bytes cannot be read") from error
        if tensor_bytes:
            self._read_into(self.sink(message, tensor_bytes))
        return message

    def _fill(self, wait: bool) -> bool:
        """Read what has arrived; with `wait`, block until something has. Returns whether anything was read."""
        if self._start == self._stop:
            self._start = self._stop = 0
        elif self._stop == len(self._buffer):
            held = bytes(self._buffer[self._start : self._stop])
            self._buffer[: len(held)] = held
            self._start, self._stop = 0, len(held)
        room = self._buffer[self._stop :] if self._stop else self._buffer
        try:
            count = self._socket.recv_into(room, 0, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except (OSError, ValueError) as error:  # broken, or closed by this end
            raise HungUpError from error
        if not count:
            raise HungUpError
        self._stop += count
        return True

    def _read_into(self, memory: memoryview) -> None:
        held = min(len(memory), self._stop - self._start)
        memory[:held] = self._buffer[self._start : self._start + held]
        self._start += held
        while held < len(memory):
            try:
                count = self._socket.recv_into(memory[held:], 0, socket.MSG_WAITALL)
            except (OSError, ValueError) as error:
                raise HungUpError from error
            if not count:
                raise HungUpError
            held += count

    def close(self) -> None:
        """Hang up, from any thread. What is under way in either direction may be lost."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Hang up and free the descriptor. Only for the thread that reads."""
        self.close()
        self._socket.close()

    def refuse(self, message: Message) -> None:
        """Send a last message, see to it that it arrives, and release."""
        self.send(message)
        # To close while there is something to read would reset the connection, and the message might be lost.
        deadline = time.monotonic() + LINGER_SECONDS
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.settimeout(LINGER_SECONDS)
            while self._socket.recv(BUFFER_BYTES) and time.monotonic() < deadline:
                pass
        self.release()


def no_tensors(message: Any, tensor_bytes: int) -> memoryview:
    """The sink of a stream on which no tensors are expected."""
    raise StreamError(f"a tensor of {tensor_bytes} bytes is not expected here")


def tune(end: socket.socket) -> None:
    """Have a TCP socket send at once, and find out when the other host is gone."""
    if end.family == socket.AF_UNIX:
        return
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def connect(
    address: str, role: Role, parse: Callable[[bytes], Received], credentials: Credentials | None = None
) -> Connection[Received]:
    """Call a listener. credentials: for TLS, which goes over TCP only.

    Raises OSError when none is there, as for the Unix socket of another host, or when it has other credentials.
    """
    host, colon, port = address.rpartition(":")
    if colon:
        end = socket.create_connection((host, int(port)))
    else:
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            end.connect("\0" + address)
        except OSError:
            end.close()
            raise
    tune(end)
    secured = secure(end, credentials, server=False) if colon else end
    secured.sendall(GREETING.pack(MAGIC, role))
    return Connection(secured, parse)


def secure(end: socket.socket, credentials: Credentials | None, *, server: bool) -> socket.socket | SecureSocket:
    """The same end under TLS, if there are credentials. Raises OSError, and closes it, when the other has none."""
    if credentials is None:
        return end
    before = end.gettimeout()
    try:
        end.settimeout(HANDSHAKE_SECONDS)
        secured = SecureSocket(end, credentials, server=server)
        end.settimeout(before)
    except OSError:
        end.close()
        raise
    return secured


def call(
    address: ServerAddress,
    role: Role,
    parse: Callable[[bytes], Received],
    *,
    inline: bool,
    credentials: Credentials | None = None,
) -> Connection[Received]:
    """Call a server by the shortest way: that its Unix socket is found is the proof that it is on this host.

    inline: go over the network all the same. credentials: of a job whose network is under TLS.

    Raises OSError when the server is not there.
    """
    if not inline:
        with contextlib.suppress(OSError):
            return connect(address.local, role, parse)
    return connect(address.network, role, parse, credentials)
