"""Gathers the state of all shards for a checkpoint, at the leader."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import torch

from ps.numerics.optimizer import StatePart
from ps.step.shard import ShardState
from ps.wire.chunks import chunks, place
from ps.wire.connection import StreamError
from steepest.v1 import exchange_pb2 as pb

MASTER, AVERAGE = "master", "average"


def parts_of(shard: ShardState) -> list[StatePart]:
    """What one shard has: its parameters (under no name, with their offset in the layout), and its optimizer's state.

    The optimizer's own parameters, if they differ, are there likewise, as the state MASTER; an average as AVERAGE.
    """
    shard.expose()
    start = shard.shard.start
    parts = [StatePart("", "", start, shard.parameters)]
    if shard.is_lossy:
        parts.append(StatePart("", MASTER, start, shard.master))
    averaged = shard.averaged
    if averaged is not None:
        parts.append(StatePart("", AVERAGE, start, averaged.cpu()))
    return [*parts, *shard.optimizer.export_state()]


def pieces(parts: Iterable[StatePart], step: int) -> Iterator[tuple[pb.Chunk, memoryview | None]]:
    """A follower's parts as the leader gets them; the last piece has no tensor."""
    for part in parts:
        dtype = str(part.values.dtype).removeprefix("torch.")
        described = [part.state, part.offset, part.values.numel(), dtype, part.shape]
        yield from chunks(part.values, step=step, name=json.dumps([part.parameter, *described]))
    yield pb.Chunk(step=step, last=True), None


class Collection:
    """The parts of one checkpoint. servers: those it waits for. waits: see Save."""

    def __init__(self, step: int, servers: Iterable[int], *, waits: bool = True) -> None:
        self.step = step
        self.waits = waits
        self._missing = set(servers)
        self._parts: dict[tuple[int, str], StatePart] = {}
        self._here: list[StatePart] = []

    @property
    def is_complete(self) -> bool:
        """Whether every server has given all it has."""
        return not self._missing

    @property
    def parts(self) -> list[StatePart]:
        """What came in."""
        return [*self._here, *self._parts.values()]

    def take(self, server: int, parts: Iterable[StatePart]) -> None:
        """Take all that a server of this process has."""
        self._here += parts
        self._missing.discard(server)

    def sink(self, server: int, chunk: pb.Chunk, num_bytes: int) -> memoryview:
        """Where the tensor of a follower's chunk belongs. Raises StreamError for one that does not fit."""
        key = (server, chunk.name)
        if key not in self._parts:
            try:
                parameter, state, offset, numel, dtype, shape = json.loads(chunk.name)
                values = torch.empty(numel, dtype=getattr(torch, dtype))
                self._parts[key] = StatePart(parameter, state, offset, values, None if shape is None else tuple(shape))
            except (ValueError, TypeError, AttributeError, RuntimeError) as error:
                raise StreamError(f"a piece of state of server {server} has no proper name") from error
        return place(self._parts[key].values, chunk, num_bytes)

    def finish(self, server: int) -> None:
        """A follower has sent all it has."""
        self._missing.discard(server)
