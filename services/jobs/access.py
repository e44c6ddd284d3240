"""Who may do what: roles, owners, and the one table of what each call needs. Both ports ask here.

A service without tokens is open to all who reach it, and those are processes of its own machine. The first token
closes it: from then on every call needs one.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from services.jobs.audit import Audit
from services.jobs.call_limit import CallLimit
from services.store.store import JobRow, Store
from services.store.tokens import Role
from steepest.errors import PermissionDeniedError, UnauthenticatedError

BEARER = "Bearer "


class Need(Enum):
    """What a call takes: any token; one that may submit; that of the job's owner, or an administrator's."""

    LOOK = "look"
    SUBMIT = "submit"
    OWN = "own"


NEEDS = {
    "UploadCode": Need.SUBMIT,
    "CreateTrainingJob": Need.SUBMIT,
    "CheckGradients": Need.SUBMIT,
    "GetServerInfo": Need.LOOK,
    "GetTrainingJob": Need.LOOK,
    "ListTrainingJobs": Need.LOOK,
    "WatchTrainingJob": Need.LOOK,
    "StreamLogs": Need.LOOK,
    "QueryHistory": Need.LOOK,
    "QueryHistograms": Need.LOOK,
    "ListEvents": Need.LOOK,
    "ListEvaluations": Need.LOOK,
    "ListCheckpoints": Need.LOOK,
    "DownloadCheckpoint": Need.LOOK,
    "CancelTrainingJob": Need.OWN,
    "PauseTrainingJob": Need.OWN,
    "ResumeTrainingJob": Need.OWN,
    "ScaleTrainingJob": Need.OWN,
    "SetPriority": Need.OWN,
    "DeleteTrainingJob": Need.OWN,
    "MeasureCurvature": Need.OWN,
}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call. name: of the token; empty while there are none."""

    name: str
    role: Role


ANYBODY = Caller("", Role.ADMIN)
_current: contextvars.ContextVar[Caller] = contextvars.ContextVar("caller", default=ANYBODY)


def current_caller() -> Caller:
    """Who makes the call that this thread answers."""
    return _current.get()


@contextmanager
def answering(caller: Caller) -> Iterator[None]:
    """Answer a call of this caller meanwhile."""
    before = _current.set(caller)
    try:
        yield
    finally:
        _current.reset(before)


class Access:
    """Answers for the calls of both ports, and has them noted."""

    def __init__(self, store: Store, audit: Audit, limit: CallLimit | None = None) -> None:
        self._store = store
        self._limit = limit or CallLimit()
        self.audit = audit

    def is_closed(self) -> bool:
        """Whether calls need a token."""
        return self._store.tokens.exist()

    def caller(self, authorization: str, peer: str) -> Caller:
        """Who says this. authorization: "Bearer TOKEN", or empty. peer: HOST:PORT that it comes from.

        Raises UnauthenticatedError, and TooManyCallsError.
        """
        try:
            caller = self._known(authorization)
        except UnauthenticatedError:
            self._limit.check("", peer)
            raise
        self._limit.check(caller.name, peer)
        return caller

    def _known(self, authorization: str) -> Caller:
        token = authorization.removeprefix(BEARER) if authorization.startswith(BEARER) else ""
        row = self._store.tokens.find(token) if token else None
        if row is not None:
            return Caller(row.name, row.role)
        if not self.is_closed():
            return ANYBODY
        if not token:
            raise UnauthenticatedError("this service needs a token: give --token, or set STEEPEST_TOKEN")
        raise UnauthenticatedError(
            "the token is unknown here, was revoked, or has expired: ask an administrator for another"
        )

    def check(self, caller: Caller, need: Need, job: str) -> None:
        """Raises PermissionDeniedError, and NotFoundError for a job that is not there. job: its id, for OWN."""
        if caller.role is Role.ADMIN or need is Need.LOOK:
            return
        if caller.role is Role.VIEWER:
            raise PermissionDeniedError(f"the token {caller.name!r} may only look: its role is viewer")
        if need is Need.OWN:
            self._check_owner(caller, self._store.get(job))

    def _check_owner(self, caller: Caller, row: JobRow) -> None:
        if row.owner != caller.name:
            whose = f"{row.owner!r}" if row.owner else "nobody"
            problem = f"{row.name} belongs to {whose}, and the token {caller.name!r} is no administrator's"
            raise PermissionDeniedError(problem)
