"""The lock under which a server handles every message, and the way its process ends."""

from __future__ import annotations

import threading


class Guard:
    """lock: held while any message is handled, so that state machines see one at a time."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.ended = threading.Event()
        self._problem = ""

    def fail(self, message: str) -> None:
        """End this server rather than hang: something of ours failed. The controller starts a new incarnation."""
        self._problem = message
        self.ended.set()

    def wait(self) -> None:
        """Block until the server has ended. Raises RuntimeError when it failed."""
        self.ended.wait()
        if self._problem:
            raise RuntimeError(self._problem)
