"""All shards of a job, as the leader reaches them: its own in this process, the others by their streams."""

from __future__ import annotations

from collections.abc import Callable

from ps.server.links import ShardLink
from ps.step.messages import Decision
from ps.wire import convert
from steepest.v1 import exchange_pb2 as pb


class RemoteShard:
    """A follower's shard."""

    def __init__(self, send: Callable[[pb.LeaderMessage], None]) -> None:
        self._send = send

    def decide(self, decision: Decision) -> None:
        """See ShardLink."""
        self._send(pb.LeaderMessage(decision=convert.decision_to_proto(decision)))

    def collect(self, step: int) -> None:
        """See ShardLink."""
        self._send(pb.LeaderMessage(collect=pb.CollectState(step=step)))


class ShardLinks:
    """own: the leader's own shard, number 0."""

    def __init__(self, own: ShardLink) -> None:
        self._own = own
        self._followers: dict[int, ShardLink] = {}

    def add(self, server: int, shard: ShardLink) -> None:
        """A follower is there."""
        self._followers[server] = shard

    @property
    def servers(self) -> list[int]:
        """The numbers of all."""
        return [0, *self._followers]

    def decide(self, decision: Decision) -> None:
        """Have all carry out a decision: the others first, so that they work beside this process."""
        for shard in self._followers.values():
            shard.decide(decision)
        self._own.decide(decision)

    def collect(self, step: int) -> None:
        """Have all send their state."""
        for shard in self._followers.values():
            shard.collect(step)
        self._own.collect(step)
