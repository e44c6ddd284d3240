"""TLS 1.3 between the processes of a job on several hosts: a socket that speaks it.

The module `ssl` lets no two threads send and receive on one socket; here it works in memory, under a lock, and the
socket itself is read and written as one without TLS.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Sequence
from typing import cast

from ps.job.credentials import NAME, Credentials

PIECE_BYTES = 256 << 10  # that are encrypted, or read, at a time


class SecureSocket:
    """A connected socket under TLS, with those methods of a socket that connections use.

    One thread may receive while others send. The handshake is done when it is there; it keeps the socket's timeout.
    Raises OSError, as ssl.SSLError, for an end that cannot show the job's certificate.
    """

    def __init__(self, end: socket.socket, credentials: Credentials, *, server: bool) -> None:
        self._socket = end
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = credentials.context(server=server)
        name = None if server else NAME
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server, server_hostname=name)
        self._crypto = threading.Lock()  # of the three above
        self._sending = threading.Lock()
        self._pending = memoryview(b"")  # encrypted, and not taken by the socket yet; under _sending
        self._shake_hands()

    def _shake_hands(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
                is_done = True
            except ssl.SSLWantReadError:
                is_done = False
            finally:
                if self._outgoing.pending:  # an alert, too
                    self._socket.sendall(self._outgoing.read())
            if is_done:
                return
            data = self._socket.recv(PIECE_BYTES)
            if not data:
                raise ConnectionError("the other end hung up before TLS was set up")
            self._incoming.write(data)

    @property
    def family(self) -> int:
        """Of the socket below."""
        return self._socket.family

    @property
    def holds_data(self) -> bool:
        """Whether something has come in that was not received; then the descriptor need not say so."""
        with self._crypto:
            return bool(self._tls.pending() or self._incoming.pending)

    def fileno(self) -> int:
        """Of the socket below."""
        return self._socket.fileno()

    def settimeout(self, seconds: float | None) -> None:
        """As of a socket."""
        self._socket.settimeout(seconds)

    def shutdown(self, how: int) -> None:
        """As of a socket."""
        self._socket.shutdown(how)

    def close(self) -> None:
        """As of a socket."""
        self._socket.close()

    # -- receiving ----------------------------------------------------------------------------------------------------

    def recv_into(self, memory: memoryview, num_bytes: int = 0, flags: int = 0) -> int:
        """As of a socket; it may be less than there is room for whatever the flags. flags: MSG_DONTWAIT counts."""
        num_bytes = num_bytes or len(memory)
        while True:
            with self._crypto:
                try:
                    return cast("int", self._tls.read(num_bytes, memory))  # typeshed has bytes, as without memory
                except ssl.SSLWantReadError:
                    pass
                except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                    return 0
            data = self._socket.recv(PIECE_BYTES, flags & socket.MSG_DONTWAIT)
            if not data:
                return 0
            with self._crypto:
                self._incoming.write(data)

    def recv(self, num_bytes: int, flags: int = 0) -> bytes:
        """As of a socket. flags: MSG_WAITALL counts."""
        data = bytearray(num_bytes)
        held = 0
        while held < num_bytes:
            count = self.recv_into(memoryview(data)[held:])
            held += count
            if not count or not flags & socket.MSG_WAITALL:
                break
        return bytes(data[:held])

    # -- sending ------------------------------------------------------------------------------------------------------

    def sendmsg(self, parts: Sequence[memoryview], ancillary: Sequence[object] = (), flags: int = 0) -> int:
        """As of a socket with MSG_DONTWAIT: what it returns has been taken, and is sent without further calls."""
        if not self._sending.acquire(blocking=False):
            raise BlockingIOError
        try:
            if not self._flush():
                raise BlockingIOError
            taken, total = 0, sum(map(len, parts))
            for piece in _pieces(parts):
                self._encrypt(piece)
                taken += sum(map(len, piece))
                if not self._flush():
                    if taken == total:  # nobody calls again to have the rest sent
                        threading.Thread(target=self._send_rest, daemon=True).start()
                    break
            return taken
        finally:
            self._sending.release()

    def sendall(self, data: memoryview | bytes) -> None:
        """As of a socket."""
        with self._sending:
            self._flush_waiting()
            for piece in _pieces([memoryview(data)]):
                self._encrypt(piece)
                self._flush_waiting()

    def _encrypt(self, parts: Sequence[memoryview]) -> None:
        with self._crypto:
            for part in parts:
                written = 0
                while written < len(part):
                    written += self._tls.write(part[written:])
            self._pending = memoryview(self._outgoing.read())

    def _flush(self) -> bool:
        """Send what the socket takes at once. Returns whether that is all."""
        while len(self._pending):
            try:
                sent = self._socket.send(self._pending, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            self._pending = self._pending[sent:]
        return True

    def _flush_waiting(self) -> None:
        pending, self._pending = self._pending, memoryview(b"")
        self._socket.sendall(pending)

    def _send_rest(self) -> None:
        with self._sending, contextlib.suppress(OSError):
            self._flush_waiting()


def _pieces(parts: Sequence[memoryview]) -> list[list[memoryview]]:
    """The same bytes in lists of at most PIECE_BYTES."""
    found: list[list[memoryview]] = [[]]
    room = PIECE_BYTES
    for part in parts:
        flat, start = part.cast("B"), 0
        while start < len(flat):
            if not room:
                found.append([])
                room = PIECE_BYTES
            stop = min(len(flat), start + room)
            found[-1].append(flat[start:stop])
            room -= stop - start
            start = stop
    return found if found[-1] else found[:-1]
