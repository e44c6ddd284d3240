"""Rows of jobs that were read before: most questions are for a row that has not changed since the last one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

MOST_KEPT = 2000

Row = TypeVar("Row")


class Known(Generic[Row]):
    """Keeps what was read until it is written. Safe to use from many threads, and true for one process that writes.

    A reader takes `reading` before it asks the database and gives it back with what it has found: what was read before
    a write and arrives after it is not kept.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[str, Row] = {}
        self._num_written = 0

    def get(self, key: str) -> Row | None:
        """What is kept, if anything."""
        return self._rows.get(key)

    def of(self, key: str, read: Callable[[], Row]) -> Row:
        """What is kept, or else what `read` finds, which is kept then."""
        known = self.get(key)
        if known is not None:
            return known
        reading = self.reading
        row = read()
        self.keep(key, row, reading)
        return row

    @property
    def reading(self) -> int:
        """Say that a read begins."""
        return self._num_written

    def keep(self, key: str, row: Row, reading: int) -> None:
        """Keep what a read has found, unless something was written meanwhile."""
        with self._lock:
            if reading != self._num_written:
                return
            if len(self._rows) >= MOST_KEPT:
                self._rows.clear()
            self._rows[key] = row

    def written(self, key: str) -> None:
        """Forget a row, after its change is in the database."""
        with self._lock:
            self._num_written += 1
            self._rows.pop(key, None)
