"""The residuals of a compressed job while they are with the leader: on their way to disk, or to another worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ps.wire.chunks import place
from ps.wire.connection import StreamError
from steepest.v1 import exchange_pb2 as pb

NAME = "residual"  # of a chunk


class Residuals:
    """numel: elements of each, the codec's state included. held: those that are here, by part."""

    def __init__(self, numel: int, dtype: torch.dtype, held: Mapping[int, torch.Tensor]) -> None:
        self.held = dict(held)
        self._numel = numel
        self._dtype = dtype
        self._missing: dict[int, str] = {}  # part -> who has it
        self._arriving: dict[int, torch.Tensor] = {}
        self._then: Callable[[dict[int, torch.Tensor]], None] | None = None

    def await_from(
        self, owners: Mapping[int, str], then: Callable[[dict[int, torch.Tensor]], None]
    ) -> dict[str, list[int]]:
        """Wait for residuals from workers, and call `then` with them when all are here.

        Returns which parts are to be asked of each worker; with none, `then` has been called.
        """
        self._missing, self._arriving, self._then = dict(owners), {}, then
        asked: dict[str, list[int]] = {}
        for part, owner in owners.items():
            asked.setdefault(owner, []).append(part)
        if not asked:
            self._finish()
        return asked

    def sink(self, worker: str, chunk: pb.Chunk, num_bytes: int) -> memoryview:
        """Where a piece belongs. Raises StreamError for one that is not expected or does not fit."""
        part = chunk.slot
        if chunk.name != NAME or self._missing.get(part) != worker:
            raise StreamError(f"a residual of part {part} is not expected from {worker}")
        if part not in self._arriving:
            self._arriving[part] = torch.empty(self._numel, dtype=self._dtype)
        return place(self._arriving[part], chunk, num_bytes)

    def arrived(self, worker: str, part: int) -> None:
        """The last piece of one is here."""
        if self._missing.get(part) == worker:
            del self._missing[part]
            if not self._missing:
                self._finish()

    def _finish(self) -> None:
        then, arrived = self._then, self._arriving
        self._then, self._arriving = None, {}
        if then is not None:
            then(arrived)
