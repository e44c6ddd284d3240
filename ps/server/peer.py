"""A worker as one server sees it: how to send to it, and where its gradients lie."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ps.memory.gpu import Device, DeviceError, DeviceReference
from ps.memory.segment import Segment
from ps.parameters.layout import Layout, Shard
from ps.wire.chunks import place
from ps.wire.connection import Connection, StreamError
from steepest.v1 import exchange_pb2 as pb


class Peer:
    """One worker's stream to one server, or that of another host's home.

    shard: the server's, None when it has none. slots: the worker's mapped gradient slots, each a whole layout; None for
    gradients that come inline. inline_parameters: whether this server sends its parameters as chunks.
    carries_gradients: False for a worker that pushes them to a server on its own host. payload_bytes: of a compressed
    gradient's part for this server; 0 when none are welcome. residual: where the residual of a part belongs. device:
    the GPU that both compute on, where its sums are read and it reads this server's parameters; None otherwise.
    """

    def __init__(
        self,
        worker: str,
        shard: Shard | None,
        slots: Segment | None,
        connection: Connection[pb.WorkerMessage],
        *,
        inline_parameters: bool,
        carries_gradients: bool,
        payload_bytes: int = 0,
        residual: Callable[[str, pb.Chunk, int], memoryview] | None = None,
        device: Device | None = None,
    ) -> None:
        self.worker = worker
        self.inline_parameters = inline_parameters
        self.carries_gradients = carries_gradients
        self.is_mapped = slots is not None
        self.send = connection.send
        self.end = connection.close
        self._shard = shard
        self._slots = slots
        self._parts: dict[int, torch.Tensor] = {}
        self._payload_bytes = payload_bytes
        self._payloads: dict[int, torch.Tensor] = {}
        self._residual = residual
        self._device = device
        self._on_gpu: dict[int, torch.Tensor] = {}  # slots, each a whole layout
        # Of what is coming in, by slot and whether it is compressed: the step it is of, and how many bytes are here.
        self._arrived: dict[tuple[int, bool], tuple[int, int]] = {}

    @property
    def is_on_gpu(self) -> bool:
        """Whether it reads this server's parameters on the GPU."""
        return self._device is not None

    def show(self, slot: int, reference: DeviceReference) -> None:
        """Note where a slot lies on the GPU. Raises StreamError when it cannot be had."""
        layout = self._own.layout
        try:
            if self._device is None:
                raise DeviceError("it is on another one")
            self._on_gpu[slot] = self._device.open(reference, layout.dtype, layout.numel)
        except DeviceError as error:
            hint = "use placement.server_device = cpu"
            raise StreamError(f"slot {slot} of {self.worker} on the GPU cannot be had: {error}; {hint}") from error

    def pushed_on_gpu(self, slot: int) -> torch.Tensor:
        """The shard's part of a slot that was pushed. Raises StreamError for one that was not shown."""
        if slot not in self._on_gpu:
            raise StreamError(f"slot {slot} of {self.worker} was pushed and never shown")
        return self._on_gpu[slot][self._own.start : self._own.stop]

    def pushed(self, slot: int, step: int, *, compressed: bool) -> torch.Tensor:
        """The shard's part of a slot that was pushed in a step, or of its payload.

        Raises StreamError when it did not come in as a whole.
        """
        value = self._payload(slot) if compressed else self.part(slot)
        if self._slots is None:
            of_step, arrived = self._arrived.pop((slot, compressed), (step, 0))
            if (of_step, arrived) != (step, value.nbytes):
                raise StreamError(f"{arrived} bytes of slot {slot} came before its push; it has {value.nbytes}")
        return value

    def _payload(self, slot: int) -> torch.Tensor:
        if slot not in self._payloads:
            self._payloads[slot] = torch.empty(self._payload_bytes, dtype=torch.uint8)
        return self._payloads[slot]

    def part(self, slot: int) -> torch.Tensor:
        """The shard's part of a slot, shape (shard.numel,)."""
        if slot not in self._parts:
            shard = self._own
            if self._slots is not None:
                offset = slot * shard.layout.numel + shard.start
                self._parts[slot] = self._slots.tensor(shard.layout.dtype, shard.numel, offset=offset)
            else:
                self._parts[slot] = torch.zeros(shard.numel, dtype=shard.layout.dtype)
        return self._parts[slot]

    def whole(self, slot: int, layout: Layout) -> torch.Tensor:
        """A mapped slot, shape (layout.numel,)."""
        assert self._slots is not None  # noqa: S101  # the caller has looked
        return self._slots.tensor(layout.dtype, layout.numel, offset=slot * layout.numel)

    @property
    def _own(self) -> Shard:
        assert self._shard is not None  # noqa: S101  # nothing else is asked for a part
        return self._shard

    def sink(self, message: pb.WorkerMessage, num_bytes: int) -> memoryview:
        """Where a piece of an inline gradient or a residual belongs. Raises StreamError for one that does not fit."""
        chunk = message.chunk
        if chunk.name and self._residual is not None:
            return self._residual(self.worker, chunk, num_bytes)
        welcome = self.carries_gradients and self._slots is None and chunk.slot >= 0
        if message.WhichOneof("message") != "chunk" or not welcome:
            raise StreamError(f"a tensor of {num_bytes} bytes is not expected here")
        into = self._payload(chunk.slot) if chunk.compressed else self.part(chunk.slot)
        memory = place(into, chunk, num_bytes)
        key = (chunk.slot, chunk.compressed)
        of_step, arrived = self._arrived.get(key, (chunk.step, 0))
        if of_step != chunk.step:  # a sum of which a part came, and that was never pushed
            arrived = 0
        self._arrived[key] = chunk.step, arrived + num_bytes
        return memory
