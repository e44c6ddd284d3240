"""Every error that steepest raises, on one screen.

SteepestError
├── SpecError           the job spec or the task is refused; names each field, its value and what is allowed
├── JobFailedError      a job that was waited for ended FAILED or CANCELLED
├── NotFoundError       no such job
├── ConflictError       the request does not fit the job's state, or the id is taken
│   └── ChangedError    the job is not any more as the request's etag says
├── OutOfRangeError     there is nothing yet at the place that a stream is to begin at
├── UnauthenticatedError    the service needs a token, and there is none, or one that it does not know
├── PermissionDeniedError   the token may not do that
├── TooManyCallsError       the caller asks more often than the service lets one
└── ServiceUnavailableError    the service does not answer, or a resource it needs is not there
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class SteepestError(Exception):
    """Base of all errors of this package."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One refused field. field: its path, such as "optimizer.lr"; problem: what is wrong and what is allowed."""

    field: str
    problem: str

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


class SpecError(SteepestError):
    """A job spec, or the task it names, is refused."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("\n".join(map(str, self.violations)))


class JobFailedError(SteepestError):
    """A job ended FAILED or CANCELLED."""


class NotFoundError(SteepestError):
    """There is no such job."""


class ConflictError(SteepestError):
    """The request does not fit the job's state."""


class ChangedError(ConflictError):
    """The job has changed since the caller saw it."""


class OutOfRangeError(SteepestError):
    """What is asked to go on from does not exist."""


class UnauthenticatedError(SteepestError):
    """The service needs a token that it knows."""


class PermissionDeniedError(SteepestError):
    """The token may not do that."""


class TooManyCallsError(SteepestError):
    """The caller asks too often. retry_seconds: after which it may ask again."""

    def __init__(self, message: str, retry_seconds: float = 1.0) -> None:
        self.retry_seconds = retry_seconds
        super().__init__(message)


class ServiceUnavailableError(SteepestError):
    """The service does not answer."""
