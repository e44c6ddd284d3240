"""How leader and shards reach each other, and who hears of workers: one protocol within a process and between two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ps.numerics.optimizer import StatePart
from ps.step.messages import Decision, Failure, Push, Round
from ps.step.signals import UpdateSignals
from ps.wire.connection import StreamError
from steepest.v1 import exchange_pb2 as pb


class ShardLink(Protocol):
    """A shard, as the leader reaches it."""

    def decide(self, decision: Decision) -> None:
        """Carry out a decision, then answer `applied`."""

    def collect(self, step: int) -> None:
        """Send all state of the shard, for a checkpoint of that step."""


class LeaderLink(Protocol):
    """The leader, as a shard reaches it."""

    def report(self, step: int, kind: Round, sums: NDArray[np.float64], signals: NDArray[np.float64] | None) -> None:
        """The round is reduced and measured: sums of squares of the shard's segments. signals: of the gradient."""

    def applied(self, step: int, clipped_sum: float, signals: UpdateSignals, direction: bytes) -> None:
        """A decision is carried out. signals: of the update. direction: of the next step, see Assign."""

    def state(self, step: int, parts: Iterator[StatePart]) -> None:
        """All state of the shard."""


class WorkerListener(Protocol):
    """Who hears of workers besides the shard: the leader, on server 0; on followers, nobody."""

    def join(self, worker: str, host: str) -> None:
        """A worker is there."""

    def leave(self, worker: str) -> None:
        """A worker is gone."""

    def replace(self, worker: str) -> None:
        """A newer generation of a worker is there before the older one was seen to go."""

    def push(self, worker: str, push: Push) -> None:
        """A worker's answer."""

    def failure(self, worker: str, failure: Failure) -> None:
        """A worker's user code failed."""

    def printed(self, worker: str, lines: Iterable[pb.PrintedLine]) -> None:
        """A worker's user code has printed something."""

    def residual_sink(self, worker: str, chunk: pb.Chunk, num_bytes: int) -> memoryview:
        """Where a piece of a residual belongs. Raises StreamError for one that is not expected."""

    def residual(self, worker: str, part: int) -> None:
        """A worker has handed in the residual of a part."""


class Bystander:
    """The listener of a follower: a worker tells the leader itself."""

    def join(self, worker: str, host: str) -> None:
        """See WorkerListener."""

    def leave(self, worker: str) -> None:
        """See WorkerListener."""

    def replace(self, worker: str) -> None:
        """See WorkerListener."""

    def push(self, worker: str, push: Push) -> None:
        """See WorkerListener."""

    def failure(self, worker: str, failure: Failure) -> None:
        """See WorkerListener."""

    def printed(self, worker: str, lines: Iterable[pb.PrintedLine]) -> None:
        """See WorkerListener."""

    def residual_sink(self, worker: str, chunk: pb.Chunk, num_bytes: int) -> memoryview:
        """See WorkerListener: a follower takes none."""
        raise StreamError(f"a tensor of {num_bytes} bytes is not expected here")

    def residual(self, worker: str, part: int) -> None:
        """See WorkerListener."""
