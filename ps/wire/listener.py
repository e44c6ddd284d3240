"""Takes calls and serves each in a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic

from ps.job.credentials import Credentials
from ps.wire.connection import (
    FIRST_MESSAGE_BYTES,
    GREETING,
    MAGIC,
    Connection,
    Received,
    Role,
    StreamError,
    secure,
    tune,
)

log = logging.getLogger(__name__)

GREETING_SECONDS = 10.0


@dataclass(frozen=True)
class Service(Generic[Received]):
    """How callers of one role are served: each in a thread of its own, by `serve`, which trusts them or hangs up."""

    parse: Callable[[bytes], Received]
    serve: Callable[[Connection[Received]], None]


class Listener:
    """Takes calls on one socket. address: "host:port" for TCP, else the name of a Unix socket.

    credentials: for TLS over TCP; without them it is open.
    """

    def __init__(
        self, services: Mapping[Role, Service[Any]], host: str | None = None, credentials: Credentials | None = None
    ) -> None:
        if host is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.address = f"steepest-{secrets.token_hex(16)}"
            self._socket.bind("\0" + self.address)
        else:
            self._socket = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
            self.address = f"{host}:{self._socket.getsockname()[1]}"
        self._socket.listen()
        self._services = services
        self._credentials = None if host is None else credentials
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                end, caller = self._socket.accept()
                threading.Thread(target=self._serve, args=(end, caller), daemon=True).start()

    def _serve(self, end: socket.socket, caller: object) -> None:
        try:
            tune(end)
            end.settimeout(GREETING_SECONDS)
            secured = secure(end, self._credentials, server=True)
            magic, role = GREETING.unpack(secured.recv(GREETING.size, socket.MSG_WAITALL))
            if magic != MAGIC or role not in self._services:
                raise StreamError("it does not speak this protocol")
        except (OSError, struct.error, StreamError) as error:
            log.warning("a caller from %s is turned away: %s", caller, error)
            end.close()
            return
        service = self._services[Role(role)]
        service.serve(Connection(secured, service.parse, FIRST_MESSAGE_BYTES))

    def close(self) -> None:
        """Take no more calls."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
