"""A worker as one server sees it: how to send to it, and where its gradients lie."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ps.config import CHUNK_BYTES
from ps.layout import Shard
from ps.segment import Segment
from steepest.v1 import exchange_pb2 as pb


class Peer:
    """One worker's stream to one server.

    slots: the worker's mapped gradient slots, each a whole layout; None for the inline transport.
    inline_parameters: whether this server sends its parameters as chunks.
    send: gives the worker a message; end: hangs up.
    """

    def __init__(
        self,
        worker: str,
        generation: int,
        shard: Shard,
        slots: Segment | None,
        send: Callable[[pb.ServerMessage], None],
        end: Callable[[], None],
        *,
        inline_parameters: bool,
    ) -> None:
        self.worker = worker
        self.generation = generation
        self.inline_parameters = inline_parameters
        self.send = send
        self.end = end
        self._shard = shard
        self._slots = slots
        self._parts: dict[int, torch.Tensor] = {}

    @property
    def slots_mapped(self) -> bool:
        """Whether gradients come through shared memory."""
        return self._slots is not None

    def part(self, slot: int) -> torch.Tensor:
        """The shard's part of a slot, shape (shard.numel,)."""
        if slot not in self._parts:
            shard, dtype = self._shard, self._shard.layout.dtype
            if self._slots is not None:
                offset = slot * shard.layout.numel + shard.start
                self._parts[slot] = self._slots.tensor(dtype, shard.numel, offset=offset)
            else:
                self._parts[slot] = torch.zeros(shard.numel, dtype=dtype)
        return self._parts[slot]

    def write(self, chunk: pb.Chunk) -> None:
        """Put a piece of an inline gradient in its place. Raises ValueError for one that does not fit."""
        itemsize = self._shard.layout.itemsize
        start, rest = divmod(chunk.offset, itemsize)
        count = len(chunk.data) // itemsize
        fits = start >= 0 and start + count <= self._shard.numel and count * itemsize == len(chunk.data)
        if self._slots is not None or rest or not fits or chunk.slot < 0:
            raise ValueError(f"a gradient chunk of {len(chunk.data)} bytes at {chunk.offset} does not fit the shard")
        if count:
            values = torch.frombuffer(bytearray(chunk.data), dtype=self._shard.layout.dtype)
            self.part(chunk.slot)[start : start + count] = values


def chunks(flat: torch.Tensor, *, step: int = 0, slot: int = 0, name: str = "") -> list[pb.Chunk]:
    """A flat tensor as raw pieces of at most CHUNK_BYTES, at least one; the last is marked."""
    data = flat.reshape(-1).view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    starts = range(0, max(len(data), 1), CHUNK_BYTES)
    return [
        pb.Chunk(
            step=step,
            slot=slot,
            name=name,
            offset=start,
            data=bytes(data[start : start + CHUNK_BYTES]),
            last=start + CHUNK_BYTES >= len(data),
        )
        for start in starts
    ]
