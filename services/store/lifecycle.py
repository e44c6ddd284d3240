"""The states of a job and the legal moves between them: the one table that servicer and controller consult."""

from __future__ import annotations

from enum import StrEnum

from steepest.errors import ConflictError


class JobState(StrEnum):
    """The states of a training job."""

    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    PAUSING = "PAUSING"
    PAUSED = "PAUSED"
    RECOVERING = "RECOVERING"
    CANCELLING = "CANCELLING"
    CANCELLED = "CANCELLED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"


_S = JobState

ENDED = frozenset({_S.CANCELLED, _S.SUCCEEDED, _S.FAILED})

MOVES: dict[JobState, frozenset[JobState]] = {
    _S.QUEUED: frozenset({_S.STARTING, _S.CANCELLING, _S.CANCELLED, _S.FAILED}),
    _S.STARTING: frozenset({_S.RUNNING, _S.RECOVERING, _S.CANCELLING, _S.FAILED}),
    _S.RUNNING: frozenset({_S.PAUSING, _S.RECOVERING, _S.CANCELLING, _S.SUCCEEDED, _S.FAILED}),
    # A job whose last step ends while it is pausing succeeds.
    _S.PAUSING: frozenset({_S.PAUSED, _S.RUNNING, _S.RECOVERING, _S.CANCELLING, _S.SUCCEEDED, _S.FAILED}),
    _S.PAUSED: frozenset({_S.RUNNING, _S.RECOVERING, _S.CANCELLING, _S.FAILED}),
    _S.RECOVERING: frozenset({_S.RUNNING, _S.PAUSING, _S.CANCELLING, _S.FAILED}),
    # A job whose last step ends while it is being cancelled has succeeded.
    _S.CANCELLING: frozenset({_S.CANCELLED, _S.SUCCEEDED, _S.FAILED}),
    _S.CANCELLED: frozenset(),
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset(),
}

# In which states a user's request is possible.
VERBS: dict[str, frozenset[JobState]] = {
    "pause": frozenset({_S.RUNNING, _S.PAUSING, _S.PAUSED}),
    "resume": frozenset({_S.PAUSING, _S.PAUSED, _S.RUNNING}),
    "cancel": frozenset(_S) - ENDED,
    "scale": frozenset(_S) - ENDED - {_S.CANCELLING},
    "delete": ENDED,
    "priority": frozenset(_S) - ENDED,
}


def check_move(job: str, old: JobState, new: JobState) -> None:
    """Raises ConflictError for a move that the table does not have."""
    if new not in MOVES[old]:
        raise ConflictError(f"{job} is {old}; it cannot become {new}")


def check_verb(job: str, state: JobState, verb: str) -> None:
    """Raises ConflictError when a verb does not fit the state of the job."""
    if state not in VERBS[verb]:
        allowed = ", ".join(s for s in JobState if s in VERBS[verb])
        raise ConflictError(f"{job} is {state}; {verb} is possible in: {allowed}")
