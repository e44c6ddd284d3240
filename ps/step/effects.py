"""What the leader wants done: its state machine returns these, and `ps.server.parameter_server` carries them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from ps.step.messages import Assign, Decision, Failure
from ps.step.record import CompletedStep


class Phase(StrEnum):
    """What the leader is doing."""

    WAITING = "waiting"  # no worker is there to work
    WORKING = "working"
    PAUSED = "paused"
    SAVING = "saving"
    SETTLING = "settling"  # residuals change hands
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


ENDED = frozenset({Phase.FINISHED, Phase.CANCELLED, Phase.FAILED})


class Send(NamedTuple):
    """Give work to a worker. handed: parts of the step whose residuals the leader has, and gives to it before."""

    worker: str
    assign: Assign
    handed: tuple[int, ...] = ()


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
    is_best: bool = False


@dataclass(frozen=True, slots=True)
class Save:
    """Write a checkpoint of the present version, then call `saved`. owners: part -> the worker with its residual.

    waits: else call `copied` as soon as the version may change.
    """

    step: int
    owners: Mapping[int, str] = field(default_factory=dict)
    waits: bool = True


@dataclass(frozen=True, slots=True)
class Settle:
    """Have workers hand in residuals of parts that others are to compute, then call `settled`. owners: as in Save."""

    step: int
    owners: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Lost:
    """State of the job is gone with a worker: all servers are to go back to the last checkpoint."""

    reason: str


@dataclass(frozen=True, slots=True)
class PhaseChanged:
    """The phase is another one now."""

    phase: Phase
    reason: str
    worker: str = ""
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Hung:
    """A worker has not answered for worker_timeout_seconds, and must be killed."""

    worker: str


Effect = Send | Dismiss | Decide | Stepped | Evaluated | Save | Settle | Lost | PhaseChanged | Hung
