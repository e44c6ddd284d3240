"""The residuals of a compressed job while they are with the leader: on their way to disk, or to another worker."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ps.wire.chunks import place
from ps.wire.connection import StreamError
from steepest.v1 import exchange_pb2 as pb

NAME = "residual"  # of a chunk


class Residuals:
    """numel: elements of each, the codec's state included. held: those that are here, by part."""

    def __init__(self, numel: int, dtype: torch.dtype, held: Mapping[int, torch.Tensor]) -> None:
        self.held = dict(held)
        self.dtype = dtype
        self._numel = numel
        self._missing: dict[int, str] = {}  # part -> who has it
        self._arriving: dict[int, torch.Tensor] = {}

    def ask(self, owners: Mapping[int, str]) -> dict[str, list[int]]:
        """Wait for residuals from workers. owners: part -> who has it. Returns which parts to ask of each worker."""
        self._missing, self._arriving = dict(owners), {}
        asked: dict[str, list[int]] = {}
        for part, owner in owners.items():
            asked.setdefault(owner, []).append(part)
        return asked

    @property
    def is_complete(self) -> bool:
        """Whether every requested residual has arrived."""
        return not self._missing

    def sink(self, worker: str, chunk: pb.Chunk, num_bytes: int) -> memoryview:
        """Where a piece belongs. Raises StreamError for one that is not expected or does not fit."""
        part = chunk.slot
        if chunk.name != NAME or self._missing.get(part) != worker:
            raise StreamError(f"a residual of part {part} is not expected from {worker}")
        if part not in self._arriving:
            self._arriving[part] = torch.empty(self._numel, dtype=self.dtype)
        return place(self._arriving[part], chunk, num_bytes)

    def arrived(self, worker: str, part: int) -> bool:
        """Note that a residual is complete. Returns whether it was the last one requested."""
        if self._missing.get(part) != worker:
            return False
        del self._missing[part]
        return self.is_complete

    def take(self) -> dict[int, torch.Tensor]:
        """Hand out the requested residuals."""
        arrived, self._arriving = self._arriving, {}
        return arrived
