"""Compresses a worker's gradients part by part, and keeps what was not sent of each for the next step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ps.compression.codec import Codec
from ps.numerics.tree import Node, parts_of_step
from ps.parameters.layout import Layout, Shard


class Compressor:
    """The residuals and payloads of the parts that a worker computes.

    part_leaves, num_leaves: micro-batches of a part and of a step.
    """

    def __init__(self, codec: Codec, layout: Layout, part_leaves: int, num_leaves: int) -> None:
        self._codec = codec
        self._layout = layout
        self._parts = parts_of_step(num_leaves, part_leaves)
        self._payload_bytes = codec.span(0, layout.numel)[1]
        self._residuals: dict[int, torch.Tensor] = {}
        self._payloads: dict[int, torch.Tensor] = {}

    def parts(self, low: int, high: int) -> dict[int, Node]:
        """The parts in a range of micro-batches, by number. Raises ValueError for a range not made of whole parts."""
        inside = {part: node for part, node in enumerate(self._parts) if low <= node.low and node.high <= high}
        if sum(node.high - node.low for node in inside.values()) != high - low:
            size = self._parts[0].high
            raise ValueError(f"micro-batches [{low}, {high}) are no whole parts of {size}")
        return inside

    def keep(self, parts: Iterable[int]) -> None:
        """Forget all parts but these: others compute them from now on."""
        kept = set(parts)
        for part in self._residuals.keys() - kept:
            del self._residuals[part]
            self._payloads.pop(part, None)

    def residual(self, part: int) -> torch.Tensor:
        """What was not sent of a part, and then the codec's state: shape (layout.numel + codec.state_numel,)."""
        if part not in self._residuals:
            nothing = torch.zeros(self._layout.numel, dtype=self._layout.dtype)
            self._residuals[part] = torch.cat([nothing, self._codec.initial_state()])
        return self._residuals[part]

    def payload(self, part: int) -> torch.Tensor:
        """What `compress` made, a uint8 tensor; it stays as it is until the next step."""
        if part not in self._payloads:
            self._payloads[part] = torch.empty(self._payload_bytes, dtype=torch.uint8)
        return self._payloads[part]

    def payload_for(self, part: int, shard: Shard) -> torch.Tensor:
        """What a shard needs of it."""
        first, last = self._codec.span(shard.start, shard.stop)
        return self.payload(part)[first:last]

    def compress(self, part: int, gradient: torch.Tensor) -> None:
        """Encode the gradient of a part, shape (layout.numel,), together with what was left of the last one.

        One that is not finite is sent as NaN, for the leader to decide on, and leaves the residual as it was.
        """
        numel = self._layout.numel
        rest, state = self.residual(part)[:numel], self.residual(part)[numel:]
        if math.isfinite(gradient.sum(dtype=torch.float64).item()):
            rest.add_(gradient)
            self._codec.encode(rest, self.payload(part), state)
        else:
            self._codec.encode(torch.full_like(rest, math.nan), self.payload(part), state.clone())
