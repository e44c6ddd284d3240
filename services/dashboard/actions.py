"""The buttons of the page. They go through the same operations as gRPC calls, and answer only to the page itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.jobs.operations import Operations
from services.store.store import JobRow
from steepest.errors import SpecError, Violation

HEADER = "x-steepest-page"  # another site cannot have a browser send it without being asked first


class ForbiddenError(Exception):
    """The request does not come from the page."""


def check_origin(headers: Mapping[str, str]) -> None:
    """Raises ForbiddenError for a request that another site may have had a browser send."""
    origin = headers.get("origin")
    if headers.get(HEADER) != "1" or (origin is not None and origin.partition("://")[2] != headers.get("host")):
        raise ForbiddenError("this request does not come from the page")


def act(operations: Operations, job: str, verb: str, body: Any) -> JobRow:
    """Carry out a button. Raises SpecError, NotFoundError, ConflictError."""
    match verb:
        case "pause":
            return operations.pause(job)
        case "resume":
            return operations.resume(job)
        case "cancel":
            return operations.cancel(job)
        case "scale":
            workers = body.get("workers") if isinstance(body, dict) else None
            if not isinstance(workers, int) or isinstance(workers, bool):
                raise SpecError([Violation("workers", f"{workers!r} is no number of workers")])
            return operations.scale(job, workers)
    raise SpecError([Violation("verb", f"{verb!r} is unknown; allowed: pause, resume, cancel, scale")])
