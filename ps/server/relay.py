"""Speaks for the workers of one host to the servers on others: their gradients out, added up, and parameters in.

One server of each host, its home, does this. Every server elsewhere has a stream of its own, with a thread that adds
and sends a piece at a time, so that streams run side by side and the network need not wait for the last addition.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from ps.job.config import JobConfig
from ps.memory.host import host_identity
from ps.numerics.tree import Node
from ps.parameters.layout import Shard
from ps.step.host_sum import Forward, Gathering
from ps.step.messages import PROTOCOL, Push, PushedNode, Ready, Round
from ps.wire import convert
from ps.wire.address import ServerAddress
from ps.wire.chunks import place
from ps.wire.connection import Role, StreamError, call
from ps.wire.outgoing import Outgoing
from steepest.v1 import exchange_pb2 as pb

log = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0  # a worker so much slower than the others of its host is not waited for


@dataclass(frozen=True, slots=True)
class _Part:
    """Elements [start, stop) of a sum, before the rest. total: shape (layout.numel,)."""

    node: Node
    total: torch.Tensor
    start: int
    stop: int


class _Link:
    """The stream to one server. flat: the host's parameters, shape (layout.numel,). on_version: a new one is there."""

    def __init__(
        self,
        config: JobConfig,
        name: str,
        shard: Shard,
        address: ServerAddress,
        flat: torch.Tensor,
        on_version: Callable[[int, int], None],
    ) -> None:
        self._shard = shard
        self._parameters = flat[shard.start : shard.stop]
        self._on_version = on_version
        self._outbox: SimpleQueue[tuple[int, Round, _Part | list[Forward]] | None] = SimpleQueue()
        self._round = (-1, Round.TRAIN)
        # Of what was sent in this round, by its node and address; the tensor is kept, so that nothing else comes there.
        self._slots: dict[tuple[Node, int], tuple[int, torch.Tensor]] = {}
        self._connection = call(
            address, Role.RELAY, pb.ServerMessage.FromString, inline=True, credentials=config.credentials
        )
        self._connection.sink = self._sink
        hello = pb.Hello(
            fence=pb.Fence(job=config.job, incarnation=config.incarnation),
            token=config.token,
            protocol=PROTOCOL,
            worker=name,
            layout_sha256=config.model.sha256(),
            host=host_identity(),
        )
        self._connection.send(pb.WorkerMessage(hello=hello))
        self._outgoing = Outgoing(shard, self._connection.send)
        for target in (self._listen, self._send):
            threading.Thread(target=target, daemon=True).start()

    def begin(self, step: int, part: _Part) -> None:
        """Send a part of a sum in time."""
        self._outbox.put((step, Round.TRAIN, part))

    def forward(self, step: int, kind: Round, forwards: list[Forward]) -> None:
        """Send nodes in time."""
        self._outbox.put((step, kind, forwards))

    def close(self) -> None:
        """Hang up."""
        self._outbox.put(None)
        self._connection.close()

    def _send(self) -> None:
        for step, kind, what in iter(self._outbox.get, None):
            if (step, kind) != self._round:
                self._round, self._slots = (step, kind), {}
            if isinstance(what, _Part):
                self._outgoing.part(step, self._slot(what.node, what.total), what.total, what.start, what.stop)
                continue
            nodes = [PushedNode(*forward.node, self._send_sum(step, forward)) for forward in what]
            push = convert.push_to_proto(Push(step, kind, tuple(nodes), ()))
            self._connection.send(pb.WorkerMessage(push=push))

    def _slot(self, node: Node, total: torch.Tensor) -> int:
        return self._slots.setdefault((node, total.data_ptr()), (len(self._slots), total))[0]

    def _send_sum(self, step: int, forward: Forward) -> int | None:
        """Send what is missing of a sum, each piece when it is added up. Returns its slot, None for no samples."""
        if forward.total is None:
            return None

        def add(start: int, stop: int) -> None:
            for to, from_ in forward.additions:
                to[start:stop].add_(from_[start:stop])

        slot = self._slot(forward.node, forward.total)
        self._outgoing.rest(step, slot, forward.total, add)
        return slot

    def _sink(self, message: pb.ServerMessage, num_bytes: int) -> memoryview:
        if message.WhichOneof("message") != "chunk":
            raise StreamError(f"a tensor of {num_bytes} bytes is not expected here")
        return place(self._parameters, message.chunk, num_bytes)

    def _listen(self) -> None:
        """When this ends the server is gone, and the controller starts a new incarnation."""
        try:
            for message in self._connection:
                if message.WhichOneof("message") == "chunk" and message.chunk.last:
                    self._on_version(self._shard.index, message.chunk.step)
                elif message.WhichOneof("message") == "refusal":
                    log.error("server %d refuses this host: %s", self._shard.index, message.refusal.reason)
        except StreamError as error:
            log.error("server %d: %s", self._shard.index, error)


class Relay:
    """One host's side. servers: those elsewhere, with their shards. announce: a version of all of them is here."""

    def __init__(
        self,
        config: JobConfig,
        name: str,
        servers: Mapping[Shard, ServerAddress],
        flat: torch.Tensor,
        announce: Callable[[int], None],
    ) -> None:
        self._announce = announce
        self._lock = threading.Lock()
        self._versions = {shard.index: -1 for shard in servers}
        self._gathering = Gathering(config.spec.data.num_micro_batches)
        self._links = [
            _Link(config, name, shard, address, flat, self._on_version) for shard, address in servers.items()
        ]

    @property
    def arrived(self) -> int:
        """The newest version that is here as a whole; -1: none."""
        return min(self._versions.values())

    def push(self, push: Push, nodes: Iterable[tuple[Node, torch.Tensor | None]], now: float) -> None:
        """Take a worker's nodes, each a whole layout, and send on what is ready."""
        self._forward(push.step, push.kind, self._gathering.add(push.step, push.kind, nodes, push.host_ranges, now))

    def begin(self, ready: Ready, total: torch.Tensor) -> None:
        """Send on a part of a sum that a worker still computes, if no other's must be added to it.

        total: shape (layout.numel,). Unless it is what the node is pushed with, it has been sent in vain.
        """
        node = Node(ready.low, ready.high)
        if self._gathering.goes_alone(ready.step, node, ready.host_ranges):
            for link in self._links:
                link.begin(ready.step, _Part(node, total, ready.start, ready.stop))

    def flush(self) -> None:
        """Send what has arrived, because a worker is gone and may not send the rest."""
        step, kind = self._gathering.round
        self._forward(step, kind, self._gathering.flush())

    def tick(self, now: float) -> None:
        """Time passes."""
        if self._gathering.waited(now) > FLUSH_SECONDS:
            self.flush()

    def _forward(self, step: int, kind: Round, forwards: list[Forward]) -> None:
        if forwards:
            for link in self._links:
                link.forward(step, kind, forwards)

    def _on_version(self, server: int, version: int) -> None:
        with self._lock:
            before = self.arrived
            self._versions[server] = version
            after = self.arrived
        if after > before:
            self._announce(after)

    def close(self) -> None:
        """Hang up."""
        for link in self._links:
            link.close()
