"""The jobs that hold resources."""

from __future__ import annotations

import threading

from services.jobs.controller import Controller


class Running:
    """Their controllers. lock: held while a job's state and what its controller is asked must agree."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._controllers: dict[str, Controller] = {}

    def __contains__(self, job: str) -> bool:
        with self.lock:
            return job in self._controllers

    def all(self) -> list[Controller]:
        """All of them."""
        with self.lock:
            return list(self._controllers.values())

    def get(self, job: str) -> Controller | None:
        """The controller of a job, None when it holds no resources."""
        with self.lock:
            return self._controllers.get(job)

    def add(self, controller: Controller) -> None:
        """A job holds resources from now on."""
        with self.lock:
            self._controllers[controller.job] = controller

    def remove(self, job: str) -> None:
        """A job holds none any more."""
        with self.lock:
            self._controllers.pop(job, None)
