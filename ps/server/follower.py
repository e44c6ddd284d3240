"""A follower's stream to the leader."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ps.job.config import JobConfig
from ps.numerics.optimizer import StatePart
from ps.server.collection import pieces
from ps.server.guard import Guard
from ps.server.links import ShardLink
from ps.step.messages import Round
from ps.step.signals import UpdateSignals
from ps.wire import convert
from ps.wire.address import ServerAddress
from ps.wire.connection import Role, call
from steepest.v1 import exchange_pb2 as pb

log = logging.getLogger(__name__)


class RemoteLeader:
    """The leader, in another process. Raises RuntimeError when it does not let this server in, OSError without it."""

    def __init__(self, config: JobConfig, index: int, address: ServerAddress) -> None:
        self._index = index
        self._connection = call(
            address,
            Role.FOLLOWER,
            pb.LeaderMessage.FromString,
            inline=config.spec.is_inline,
            credentials=config.credentials,
        )
        fence = pb.Fence(job=config.job, incarnation=config.incarnation)
        enlist = pb.Enlist(fence=fence, token=config.token, server=index)
        self._connection.send(pb.FollowerMessage(enlist=enlist))
        first = self._connection.next_message()
        if first is None or first.WhichOneof("message") != "enlisted":
            reason = "it is gone" if first is None else first.refusal.reason
            raise RuntimeError(f"the leader refused server {index}: {reason}")

    def report(self, step: int, kind: Round, sums: NDArray[np.float64], signals: NDArray[np.float64] | None) -> None:
        """See LeaderLink."""
        report = pb.ShardReport(
            step=step, kind=kind, segment_sums=convert.sums_to_bytes(sums), signals=convert.signals_to_bytes(signals)
        )
        self._connection.send(pb.FollowerMessage(report=report))

    def applied(self, step: int, clipped_sum: float, signals: UpdateSignals, direction: bytes) -> None:
        """See LeaderLink; a direction has only a shard without others, which is the leader's own."""
        applied = pb.Applied(step=step, clipped_sum=clipped_sum, **convert.update_signals_to_fields(signals))
        self._connection.send(pb.FollowerMessage(applied=applied))

    def state(self, step: int, parts: Iterator[StatePart]) -> None:
        """See LeaderLink."""
        for chunk, data in pieces(parts, step):
            self._connection.send(pb.FollowerMessage(state=chunk), data)

    def follow(self, shard: ShardLink, guard: Guard) -> None:
        """Have the leader's requests carried out, in a thread of their own, until it is gone."""
        threading.Thread(target=self._listen, args=(shard, guard), daemon=True).start()

    def _listen(self, shard: ShardLink, guard: Guard) -> None:
        try:
            for message in self._connection:  # when they end, the leader is gone: the controller starts anew
                with guard.lock:
                    match message.WhichOneof("message"):
                        case "decision":
                            shard.decide(convert.decision_from_proto(message.decision))
                        case "collect":
                            shard.collect(message.collect.step)
        except Exception as error:
            log.exception("server %d cannot follow", self._index)
            guard.fail(f"server {self._index} failed on a message of the leader: {error!r}")

    def close(self) -> None:
        """Hang up."""
        self._connection.close()
