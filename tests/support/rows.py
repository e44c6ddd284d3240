"""Jobs as a store keeps them."""

from __future__ import annotations

from services.store.lifecycle import JobState
from services.store.store import JobRow, Result


def job_row(name: str = "a", request: str = "", created: float = 1.0) -> JobRow:
    """A job of ten steps that waits."""
    return JobRow(name, request, "{}", "{}", JobState.QUEUED, "created", 1, 0, 10, created, None, Result())
