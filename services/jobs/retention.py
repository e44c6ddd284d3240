"""Deletes jobs some time after they have ended, as the service's settings say, and code that no job has any more."""

from __future__ import annotations

import logging
import threading
import time

from services.jobs.code_bundles import UNUSED_SECONDS, CodeStore
from services.jobs.operations import Operations
from services.store.store import Store
from steepest.errors import ConflictError, NotFoundError

log = logging.getLogger(__name__)

LOOK_SECONDS = 600.0
DAY_SECONDS = 86_400.0


class Retention:
    """Looks from `start` to `stop`. days: that a job is kept for; 0: until it is deleted."""

    def __init__(self, store: Store, bundles: CodeStore, operations: Operations, days: float) -> None:
        self._store = store
        self._bundles = bundles
        self._operations = operations
        self._days = days
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    def start(self) -> None:
        """Look now, and then every ten minutes."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        code_looked = time.monotonic()  # not at the start, when there is more to do
        while True:
            try:
                if self._days:
                    self.delete_old(time.time())
                if time.monotonic() - code_looked >= UNUSED_SECONDS / 4:
                    code_looked = time.monotonic()
                    self.delete_code(time.time())
            except Exception:
                log.exception("retention")
            if self._stopping.wait(LOOK_SECONDS):
                return

    def delete_code(self, now: float) -> list[str]:
        """Delete the code of jobs that are gone; returns the names of the bundles."""
        deleted = self._bundles.delete_unused(self._store.code_bundles(), now)
        if deleted:
            log.info("%d code bundles belong to no job any more and are deleted", len(deleted))
        return deleted

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
