"""Where a server reads the gradients of one worker: memory it maps, chunks that came in, or the GPU of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from ps.memory.segment import Segment
from ps.parameters.layout import Layout, Shard
from ps.wire.chunks import place
from ps.wire.connection import StreamError
from steepest.v1 import exchange_pb2 as pb


class Slots(Protocol):
    """A worker's gradient slots, as far as this server's shard is concerned."""

    def pushed(self, slot: int, step: int, *, compressed: bool) -> torch.Tensor:
        """The shard's part of a slot that was pushed in a step, or of its payload.

        Raises StreamError when it did not come in as a whole.
        """

    def sink(self, chunk: pb.Chunk, num_bytes: int) -> memoryview:
        """Where a chunk belongs. Raises StreamError for one that does not fit or is not welcome."""


class MappedSlots:
    """Slots of a worker on this host, each a whole layout. shard: None for a server without one."""

    def __init__(self, segment: Segment, layout: Layout, shard: Shard | None) -> None:
        self._segment = segment
        self._layout = layout
        self._shard = shard
        self._parts: dict[int, torch.Tensor] = {}

    def pushed(self, slot: int, step: int, *, compressed: bool) -> torch.Tensor:
        """See Slots."""
        part = self._parts.get(slot)
        if part is None:
            assert self._shard is not None  # noqa: S101  # only a server with a shard asks for its part
            offset = slot * self._layout.numel + self._shard.start
            part = self._parts[slot] = self._segment.tensor(self._layout.dtype, self._shard.numel, offset=offset)
        return part

    def whole(self, slot: int) -> torch.Tensor:
        """A whole slot, shape (layout.numel,)."""
        return self._segment.tensor(self._layout.dtype, self._layout.numel, offset=slot * self._layout.numel)

    def sink(self, chunk: pb.Chunk, num_bytes: int) -> memoryview:
        """See Slots: what is mapped is not sent."""
        raise StreamError(f"a tensor of {num_bytes} bytes is not expected here")


class InlineSlots:
    """Slots of a worker that sends its gradients. payload_bytes: of a compressed gradient's part for this shard."""

    def __init__(self, shard: Shard, payload_bytes: int) -> None:
        self._shard = shard
        self._payload_bytes = payload_bytes
        self._parts: dict[int, torch.Tensor] = {}
        self._payloads: dict[int, torch.Tensor] = {}
        # Of what is coming in, by slot and whether it is compressed: the step it is of, and how many bytes are here.
        self._arrived: dict[tuple[int, bool], tuple[int, int]] = {}

    def pushed(self, slot: int, step: int, *, compressed: bool) -> torch.Tensor:
        """See Slots."""
        value = self._memory(slot, compressed=compressed)
        of_step, arrived = self._arrived.pop((slot, compressed), (step, 0))
        if (of_step, arrived) != (step, value.nbytes):
            raise StreamError(f"{arrived} bytes of slot {slot} came before its push; it has {value.nbytes}")
        return value

    def _memory(self, slot: int, *, compressed: bool) -> torch.Tensor:
        held = self._payloads if compressed else self._parts
        if slot not in held:
            held[slot] = (
                torch.empty(self._payload_bytes, dtype=torch.uint8)
                if compressed
                else torch.zeros(self._shard.numel, dtype=self._shard.layout.dtype)
            )
        return held[slot]

    def sink(self, chunk: pb.Chunk, num_bytes: int) -> memoryview:
        """See Slots."""
        if chunk.slot < 0:
            raise StreamError(f"a tensor of {num_bytes} bytes is not expected here")
        memory = place(self._memory(chunk.slot, compressed=chunk.compressed), chunk, num_bytes)
        key = (chunk.slot, chunk.compressed)
        of_step, arrived = self._arrived.get(key, (chunk.step, 0))
        if of_step != chunk.step:  # a sum of which a part came, and that was never pushed
            arrived = 0
        self._arrived[key] = chunk.step, arrived + num_bytes
        return memory


class NoSlots:
    """Of a worker that gives its gradients to a server on its own host."""

    def pushed(self, slot: int, step: int, *, compressed: bool) -> torch.Tensor:
        """See Slots."""
        raise StreamError(f"slot {slot} is not expected here")

    def sink(self, chunk: pb.Chunk, num_bytes: int) -> memoryview:
        """See Slots."""
        raise StreamError(f"a tensor of {num_bytes} bytes is not expected here")


class GpuSlots:
    """Slots of the worker in this process, on the GPU. slot: gives each as a whole layout, by its number."""

    def __init__(self, slot: Callable[[int], torch.Tensor], shard: Shard) -> None:
        self._slot = slot
        self._shard = shard
        self._parts: dict[int, torch.Tensor] = {}

    def pushed(self, slot: int) -> torch.Tensor:
        """The shard's part of a slot that was pushed."""
        part = self._parts.get(slot)
        if part is None:
            part = self._parts[slot] = self._slot(slot)[self._shard.start : self._shard.stop]
        return part
