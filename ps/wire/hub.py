"""Reads many connections in one thread."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from typing import Any

from ps.wire.connection import Connection, HungUpError, Received


class Hub:
    """Reads many connections in one thread, for small messages that come close together.

    Threads of their own would hand the interpreter's lock to one another, which costs more than such a message does.
    """

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._wake = os.eventfd(0)
        self._poll.register(self._wake, select.EPOLLIN)
        self._lock = threading.Lock()
        self._closed = False
        self._served: dict[int, tuple[Connection[Any], Callable[[Any], None], Callable[[Exception], None]]] = {}
        threading.Thread(target=self._run, daemon=True).start()

    def add(
        self,
        connection: Connection[Received],
        on_message: Callable[[Received], None],
        on_end: Callable[[Exception], None],
    ) -> None:
        """Serve a connection from now on. on_end: gets what ended it, a HungUpError in good order."""
        descriptor = connection.fileno()
        self._served[descriptor] = (connection, on_message, on_end)
        error = self._read(descriptor)  # what its buffer holds already wakes nobody
        if error is None:
            with self._lock:
                if not self._closed:
                    self._poll.register(descriptor, select.EPOLLIN)
                    return
            error = HungUpError("this end has stopped")
        del self._served[descriptor]
        on_end(error)

    def close(self) -> None:
        """Serve no more; the connections stay as they are, and one that is added from now on ends at once."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor == self._wake:
                    with self._lock:
                        self._poll.close()
                        os.close(self._wake)
                    return
                error = self._read(descriptor)
                if error is not None:
                    self._poll.unregister(descriptor)
                    self._served.pop(descriptor)[2](error)

    def _read(self, descriptor: int) -> Exception | None:
        """Handle the messages that have arrived. Returns the error that ended the connection, or None."""
        connection, on_message, _ = self._served[descriptor]
        try:
            while (message := connection.receive(wait=False)) is not None:
                on_message(message)
                if connection.is_empty:
                    break  # what comes now wakes us again
        except Exception as error:
            return error
        return None
