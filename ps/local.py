"""Messages between processes of one host over a Unix socket: the streams of gRPC at a fraction of its cost.

A frame is the length of a protobuf message (4 bytes, little-endian) and the message. Sockets live in Linux's abstract
namespace: nothing is left on disk, and a process on another host finds no such name. benchmarks/step_time.py measures
what they save.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

BUFFER_BYTES = 1 << 16

Received = TypeVar("Received")


class Message(Protocol):
    """A protobuf message, as far as it matters here."""

    def SerializeToString(self) -> bytes:  # noqa: N802  # protobuf's name
        """Its bytes."""


class Connection(Generic[Received]):
    """One end. Iterating gives what the other end sends, until it hangs up. parse: of a message that comes in."""

    def __init__(self, end: socket.socket, parse: Callable[[bytes], Received]) -> None:
        self._socket = end
        self._reader = end.makefile("rb", BUFFER_BYTES)
        self._parse = parse
        self._lock = threading.Lock()
        self._backlog: SimpleQueue[bytes | None] | None = None

    def send(self, message: Message) -> None:
        """Send, and never block: what the socket does not take at once, a thread of its own sends in its time.

        A connection that is broken swallows messages; who reads from it learns of that.
        """
        data = message.SerializeToString()
        frame = len(data).to_bytes(4, "little") + data
        with self._lock:
            if self._backlog is None:
                try:
                    sent = self._socket.send(frame, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    return
                if sent == len(frame):
                    return
                frame = frame[sent:]
                self._backlog = SimpleQueue()
                threading.Thread(target=self._drain, args=(self._backlog,), daemon=True).start()
            self._backlog.put(frame)

    def _drain(self, backlog: SimpleQueue[bytes | None]) -> None:
        with contextlib.suppress(OSError):
            for frame in iter(backlog.get, None):
                self._socket.sendall(frame)

    def __iter__(self) -> Iterator[Received]:
        with contextlib.suppress(OSError, ValueError):
            while len(header := self._reader.read(4)) == 4:
                length = int.from_bytes(header, "little")
                data = self._reader.read(length)
                if len(data) < length:
                    return
                yield self._parse(data)
        self.close()
        self._reader.close()
        self._socket.close()

    def close(self) -> None:
        """Hang up."""
        with self._lock:
            if self._backlog is not None:
                self._backlog.put(None)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


class Listener(Generic[Received]):
    """Takes connections, and gives each to `serve` in a thread of its own."""

    def __init__(self, parse: Callable[[bytes], Received], serve: Callable[[Connection[Received]], None]) -> None:
        self.name = f"steepest-{secrets.token_hex(16)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind("\0" + self.name)
        self._socket.listen()
        self._parse = parse
        self._serve = serve
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                end, _ = self._socket.accept()
                connection = Connection(end, self._parse)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def connect(name: str, parse: Callable[[bytes], Received]) -> Connection[Received] | None:
    """Connect to a listener on this host, or None when there is none of that name."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        end.connect("\0" + name)
    except OSError:
        end.close()
        return None
    return Connection(end, parse)
