"""Gathers the state of all shards for a checkpoint, at the leader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from ps.numerics.optimizer import StatePart
from ps.step.shard import ShardServer
from ps.wire.chunks import chunks, place
from ps.wire.connection import StreamError
from steepest.v1 import exchange_pb2 as pb

MASTER = "master"


def parts_of(server: ShardServer) -> list[StatePart]:
    """What one shard has: its parameters (under no name, with their offset in the layout), and its optimizer's state.

    The optimizer's own parameters, if they are others, are there likewise, as the state MASTER.
    """
    server.expose()
    parts = [StatePart("", "", server.shard.start, server.parameters)]
    if server.is_lossy:
        parts.append(StatePart("", MASTER, server.shard.start, server.master))
    return [*parts, *server.optimizer.export_state()]


def pieces(parts: Iterable[StatePart], step: int) -> Iterator[tuple[pb.Chunk, memoryview | None]]:
    """A follower's parts as the leader gets them; the last piece has no tensor."""
    for part in parts:
        name = f"{part.parameter}\n{part.state}\n{part.offset}\n{part.values.numel()}"
        yield from chunks(part.values, step=step, name=name)
    yield pb.Chunk(step=step, last=True), None


class Collection:
    """The parts that followers send for one checkpoint. servers: the followers it waits for.

    residuals: what workers have handed in, by part of the step.
    """

    def __init__(
        self, step: int, servers: Iterable[int], dtype: torch.dtype, residuals: Mapping[int, torch.Tensor]
    ) -> None:
        self.step = step
        self.residuals = residuals
        self._missing = set(servers)
        self._dtype = dtype
        self._parts: dict[tuple[int, str], StatePart] = {}

    @property
    def is_complete(self) -> bool:
        """Whether every follower has sent all it has."""
        return not self._missing

    @property
    def parts(self) -> list[StatePart]:
        """What came in."""
        return list(self._parts.values())

    def sink(self, server: int, chunk: pb.Chunk, num_bytes: int) -> memoryview:
        """Where the tensor of a chunk belongs. Raises StreamError for one that does not fit."""
        key = (server, chunk.name)
        if key not in self._parts:
            try:
                parameter, state, offset, numel = chunk.name.split("\n")
                dtype = torch.float32 if state == "step" else self._dtype
                self._parts[key] = StatePart(parameter, state, int(offset), torch.empty(int(numel), dtype=dtype))
            except (ValueError, RuntimeError) as error:
                raise StreamError(f"a piece of state of server {server} has no proper name") from error
        return place(self._parts[key].values, chunk, num_bytes)

    def finish(self, server: int) -> None:
        """A follower has sent all it has."""
        self._missing.discard(server)
