"""A worker, or another host's home, as one server sees it: how to send to it, and where its gradients lie."""

from __future__ import annotations

import torch

from ps.numerics.tree import Node
from ps.server.links import WorkerListener
from ps.server.slots import GpuSlots, MappedSlots, NoSlots, Slots
from ps.step.messages import Push, Round
from ps.wire.connection import Connection, StreamError
from ps.wire.in_process import InProcess
from steepest.v1 import exchange_pb2 as pb


class Peer:
    """One stream to one server.

    slots: where its gradients lie. gpu: its slots on the GPU of this process, where it also reads this server's
    parameters; None for other processes. inline_parameters: whether this server sends it parameters as chunks.
    listener: takes the residuals that it hands in.
    """

    def __init__(
        self,
        name: str,
        connection: Connection[pb.WorkerMessage] | InProcess[pb.WorkerMessage],
        slots: Slots,
        *,
        inline_parameters: bool,
        gpu: GpuSlots | None = None,
        listener: WorkerListener | None = None,
    ) -> None:
        self.name = name
        self.inline_parameters = inline_parameters
        self.send = connection.send
        self.end = connection.close
        self._slots = slots
        self._gpu = gpu
        self._listener = listener
        connection.sink = self._sink

    @property
    def is_on_gpu(self) -> bool:
        """Whether it reads this server's parameters on the GPU."""
        return self._gpu is not None

    @property
    def carries_gradients(self) -> bool:
        """Whether its pushes bring gradients to this server."""
        return not isinstance(self._slots, NoSlots)

    @property
    def mapped(self) -> MappedSlots | None:
        """Its slots, if this server maps them."""
        return self._slots if isinstance(self._slots, MappedSlots) else None

    def pushed(self, push: Push, *, compressed: bool) -> list[tuple[Node, torch.Tensor | None]]:
        """The nodes of a push with the shard's part of each sum. Raises StreamError for one that is not whole."""
        gpu = self._gpu if push.kind == Round.TRAIN else None
        slots, step = self._slots, push.step
        values: list[tuple[Node, torch.Tensor | None]] = []
        for low, high, slot in push.nodes:
            value = None
            if slot is not None:
                value = slots.pushed(slot, step, compressed=compressed) if gpu is None else gpu.pushed(slot)
            values.append((Node(low, high), value))
        return values

    def _sink(self, message: pb.WorkerMessage, num_bytes: int) -> memoryview:
        """Where a piece of a gradient or a residual belongs. Raises StreamError for one that does not fit."""
        if message.WhichOneof("message") != "chunk":
            raise StreamError(f"a tensor of {num_bytes} bytes is not expected here")
        if message.chunk.name and self._listener is not None:
            return self._listener.residual_sink(self.name, message.chunk, num_bytes)
        return self._slots.sink(message.chunk, num_bytes)


class Peers(dict[str, Peer]):
    """The workers that a server is connected to, by name."""

    def post(self, name: str, message: pb.ServerMessage, tensor: memoryview | None = None) -> None:
        """Send to a worker, if it is there. tensor: bytes to follow the message."""
        peer = self.get(name)
        if peer is not None:
            peer.send(message, tensor)
