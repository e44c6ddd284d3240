"""Deletes jobs some time after they have ended, as the service's settings say."""

from __future__ import annotations

import logging
import threading
import time

from services.jobs.operations import Operations
from services.store.store import Store
from steepest.errors import ConflictError, NotFoundError

log = logging.getLogger(__name__)

LOOK_SECONDS = 600.0
DAY_SECONDS = 86_400.0


class Retention:
    """Looks from `start` to `stop`. days: that a job is kept for; 0: until it is deleted."""

    def __init__(self, store: Store, operations: Operations, days: float) -> None:
        self._store = store
        self._operations = operations
        self._days = days
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    def start(self) -> None:
        """Look now, and then every ten minutes."""
        if self._days:
            self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                self.delete_old(time.time())
            except Exception:
                log.exception("retention")
            if self._stopping.wait(LOOK_SECONDS):
                return

    def delete_old(self, now: float) -> list[str]:
        """Delete what is old enough; returns the jobs' ids."""
        deleted = []
        for job in self._store.ended_before(now - self._days * DAY_SECONDS):
            try:
                self._operations.delete(job)
            except (ConflictError, NotFoundError):
                continue  # its processes are still ending, or somebody was faster
            log.info("trainingJobs/%s ended %g days ago and is deleted", job, self._days)
            deleted.append(job)
        return deleted
