"""Sends gradient sums to one server, in parts as they become final."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ps.numerics.ranges import gaps
from ps.parameters.layout import Shard
from ps.wire.chunks import chunks
from steepest.v1 import exchange_pb2 as pb


class Outgoing:
    """What one server has been sent of each sum of the step in progress.

    shard: the server's. send: to it, a message with the bytes of a tensor.
    """

    def __init__(self, shard: Shard, send: Callable[[pb.WorkerMessage, memoryview], None]) -> None:
        self._shard = shard
        self._send = send
        self._step = -1
        self._sent: dict[int, list[tuple[int, int]]] = {}  # by slot: elements of the layout

    def part(self, step: int, slot: int, total: torch.Tensor, start: int, stop: int) -> None:
        """Send the elements [start, stop) of a sum, as far as the shard owns them and has not been sent them.

        total: shape (layout.numel,); these elements stay as they are for the rest of the step.
        """
        if step != self._step:
            self._step, self._sent = step, {}
        sent = self._sent.setdefault(slot, [])
        for first, last in gaps(max(start, self._shard.start), min(stop, self._shard.stop), sent):
            sent.append((first, last))
            self._send_range(step, slot, total, first, last, None)

    def rest(
        self, step: int, slot: int, total: torch.Tensor, prepare: Callable[[int, int], None] | None = None
    ) -> None:
        """Send what has not been sent yet of the shard's part of a sum.

        prepare: called with (start, stop) before these elements are sent, a piece at a time.
        """
        sent = self._sent.pop(slot, []) if step == self._step else []
        for start, stop in gaps(self._shard.start, self._shard.stop, sent):
            self._send_range(step, slot, total, start, stop, prepare)

    def _send_range(
        self,
        step: int,
        slot: int,
        total: torch.Tensor,
        start: int,
        stop: int,
        prepare: Callable[[int, int], None] | None,
    ) -> None:
        itemsize = total.itemsize
        offset = (start - self._shard.start) * itemsize
        for chunk, data in chunks(total[start:stop], step=step, slot=slot, offset=offset):
            if prepare is not None:
                first = self._shard.start + chunk.offset // itemsize
                prepare(first, first + len(data) // itemsize)
            self._send(pb.WorkerMessage(chunk=chunk), data)
