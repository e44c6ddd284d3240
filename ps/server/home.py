"""What the first server of a host does for it: gradients leave for servers elsewhere, their parameters come in."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

import torch

from ps.job.config import JobConfig
from ps.numerics.tree import Node
from ps.parameters.layout import Shard
from ps.server.guard import Guard
from ps.server.peer import Peer, Peers
from ps.server.relay import Relay
from ps.server.shard_host import SUMMED
from ps.step.messages import Push, Ready
from ps.wire.address import ServerAddress
from steepest.v1 import exchange_pb2 as pb

TICK_SECONDS = 0.5


class Home:
    """elsewhere: servers on other hosts that this one speaks with for its workers; none when it is not a home.

    flat: the host's parameters, shape (layout.numel,).
    """

    def __init__(
        self,
        config: JobConfig,
        name: str,
        elsewhere: Mapping[Shard, ServerAddress],
        flat: torch.Tensor,
        peers: Peers,
        guard: Guard,
    ) -> None:
        self._peers = peers
        self._guard = guard
        self._relay: Relay | None = None
        if elsewhere:
            with guard.lock:
                self._relay = Relay(config, name, elsewhere, flat, self._announce)
            threading.Thread(target=self._tick, args=(self._relay,), daemon=True).start()

    def greet(self, peer: Peer) -> None:
        """Tell a worker which version of the parameters is here."""
        if self._relay is not None and peer.mapped is not None:
            peer.send(pb.ServerMessage(arrived=self._relay.arrived))

    def push(self, peer: Peer, push: Push) -> None:
        """Pass a worker's sums on."""
        slots = peer.mapped
        if self._relay is not None and slots is not None and push.kind in SUMMED:
            nodes = [(Node(n.low, n.high), None if n.slot is None else slots.whole(n.slot)) for n in push.nodes]
            self._relay.push(push, nodes, time.time())

    def begin(self, peer: Peer, ready: Ready) -> None:
        """Pass on what is ready of a sum that a worker still computes."""
        slots = peer.mapped
        if self._relay is not None and slots is not None:
            self._relay.begin(ready, slots.whole(ready.slot))

    def flush(self) -> None:
        """Send what has arrived, because a worker is gone and may not send the rest."""
        if self._relay is not None:
            self._relay.flush()

    def close(self) -> None:
        """Hang up."""
        if self._relay is not None:
            self._relay.close()

    def _announce(self, version: int) -> None:
        """All parameters of other hosts are here, in this version."""
        with self._guard.lock:
            for peer in self._peers.values():
                if peer.mapped is not None:
                    peer.send(pb.ServerMessage(arrived=version))

    def _tick(self, relay: Relay) -> None:
        while not self._guard.ended.wait(TICK_SECONDS):
            with self._guard.lock:
                relay.tick(time.time())
