"""Carries messages to the state machine of a server's shard, and parameters to the peers that do not map them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ps.memory.gpu import Device
from ps.parameters.layout import Shard
from ps.server.collection import parts_of
from ps.server.links import LeaderLink
from ps.server.peer import Peer
from ps.step.messages import Decision, Outcome, Push, Round
from ps.step.shard import ShardState
from ps.wire.chunks import chunks
from ps.wire.connection import StreamError
from steepest.v1 import exchange_pb2 as pb

SUMMED = frozenset({Round.TRAIN, Round.INITIALIZE})


class ShardHost:
    """One shard. device: the GPU that it is on. connected: all peers, of this host and of others."""

    def __init__(self, state: ShardState, device: Device | None, connected: Callable[[], Iterable[Peer]]) -> None:
        self.state = state
        self._device = device
        self._connected = connected
        self._leader: LeaderLink | None = None

    def report_to(self, leader: LeaderLink) -> None:
        """Send reports there from now on."""
        self._leader = leader

    @property
    def shard(self) -> Shard:
        """What it owns."""
        return self.state.shard

    @property
    def payload_bytes(self) -> int:
        """Of the shard's part of a compressed gradient; 0 when the job does not compress."""
        codec = self.state.push_codec
        if codec is None:
            return 0
        first, last = codec.span(self.shard.start, self.shard.stop)
        return last - first

    # -- gradients in -------------------------------------------------------------------------------------------------

    def take(self, peer: Peer, push: Push) -> None:
        """Hold the gradients of a push. Raises StreamError for one that is not whole, or of a step ahead."""
        if push.kind not in SUMMED or not peer.carries_gradients:
            return
        state = self.state
        compressed = state.push_codec is not None and push.kind == Round.TRAIN
        if state.accept(push.step, push.kind, peer.pushed(push, compressed=compressed)) == Outcome.AHEAD:
            raise StreamError(f"{peer.name} pushed step {push.step}; this shard is at {state.step}")

    def reduce(self, push: Push) -> None:
        """Add up and measure the round and report it, if all of it is there."""
        state = self.state
        if push.kind not in SUMMED or not state.is_complete:
            return
        step, kind = state.step, push.kind
        sums = state.reduce()
        assert self._leader is not None  # noqa: S101  # workers come after the leader is known
        self._leader.report(step, kind, sums, state.gradient_signals)

    # -- the leader's requests (ShardLink) ----------------------------------------------------------------------------

    def decide(self, decision: Decision) -> None:
        """See ShardLink."""
        clipped_sum = 0.0
        if decision.kind == Round.SHOW:
            self.state.show(average=decision.apply)
        else:
            clipped_sum = self.state.apply(decision)
        if self.state.update is None:
            self.send_parameters(self._connected())
        else:
            self._send(self._connected(), self.state.update, compressed=True)
        assert self._leader is not None  # noqa: S101  # decisions come from it
        self._leader.applied(decision.step, clipped_sum, self.state.update_signals, self.state.direction)

    def collect(self, step: int) -> None:
        """See ShardLink."""
        assert self._leader is not None  # noqa: S101  # it is the leader who asks
        self._leader.state(step, iter(parts_of(self.state)))

    # -- parameters out -----------------------------------------------------------------------------------------------

    def expose(self, peers: Iterable[Peer]) -> None:
        """Have the present version in the host's memory if any of the peers looks there."""
        if self._device is not None and not all(peer.is_on_gpu for peer in peers):
            self.state.expose()

    def send_parameters(self, peers: Iterable[Peer]) -> None:
        """Have the present version where the peers find it, and send it whole to those that do not map it.

        The next version may overwrite what is still on its way to a worker that was not waited for; that worker's
        answer then comes too late to count. Where only updates follow, nothing may overwrite it, so it is copied.
        """
        if not self.state.initialized:
            return
        peers = list(peers)
        self.expose(peers)
        parameters = self.state.parameters
        self._send(peers, parameters.clone() if self.state.is_lossy else parameters, compressed=False)

    def _send(self, peers: Iterable[Peer], tensor: torch.Tensor, *, compressed: bool) -> None:
        for peer in peers:
            if peer.inline_parameters:
                for chunk, data in chunks(tensor, step=self.state.version, compressed=compressed):
                    peer.send(pb.ServerMessage(chunk=chunk), data)


class NoShard:
    """In the place of a ShardHost on a server that is only its host's home."""

    shard: Shard | None = None
    payload_bytes = 0

    def take(self, peer: Peer, push: Push) -> None:
        """See ShardHost."""

    def reduce(self, push: Push) -> None:
        """See ShardHost."""

    def expose(self, peers: Iterable[Peer]) -> None:
        """See ShardHost."""

    def send_parameters(self, peers: Iterable[Peer]) -> None:
        """See ShardHost."""
