"""What the leader wants done: its state machine returns these, and `ps.server` carries them out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from ps.messages import Assign, Decision, Failure
from ps.record import CompletedStep


class Phase(StrEnum):
    """What the leader is doing."""

    WAITING = "waiting"  # no worker is there to work
    WORKING = "working"
    PAUSED = "paused"
    SAVING = "saving"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


ENDED = frozenset({Phase.FINISHED, Phase.CANCELLED, Phase.FAILED})


class Send(NamedTuple):
    """Give work to a worker."""

    worker: str
    assign: Assign


@dataclass(frozen=True, slots=True)
class Dismiss:
    """Tell a worker to end in good order."""

    worker: str
    reason: str


class Decide(NamedTuple):
    """Tell all shards what to do with the round."""

    decision: Decision


class Stepped(NamedTuple):
    """A step is complete."""

    completed: CompletedStep


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluation is complete."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Save:
    """Write a checkpoint of the present version, then call `saved`."""

    step: int
    updates: int


@dataclass(frozen=True, slots=True)
class PhaseChanged:
    """The phase is another one now."""

    phase: Phase
    reason: str
    worker: str = ""
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Hung:
    """A worker has not answered for worker_timeout_seconds: it is to be killed."""

    worker: str


Effect = Send | Dismiss | Decide | Stepped | Evaluated | Save | PhaseChanged | Hung
