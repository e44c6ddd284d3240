"""Tensors as chunks of bytes: how they leave one process and find their place in another."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ps.memory.raw import raw_bytes
from ps.wire.address import CHUNK_BYTES
from ps.wire.connection import StreamError
from steepest.v1 import exchange_pb2 as pb


def place(flat: torch.Tensor, chunk: pb.Chunk, num_bytes: int) -> memoryview:
    """The bytes of `flat` that a chunk is for. Raises StreamError for one that does not fit."""
    data = raw_bytes(flat)
    itemsize = flat.dtype.itemsize
    if chunk.offset % itemsize or num_bytes % itemsize or not 0 <= chunk.offset <= len(data) - num_bytes:
        raise StreamError(f"a chunk of {num_bytes} bytes at {chunk.offset} does not fit a tensor of {len(data)}")
    return data[chunk.offset : chunk.offset + num_bytes]


def chunks(
    flat: torch.Tensor, *, step: int = 0, slot: int = 0, name: str = "", compressed: bool = False, offset: int = 0
) -> Iterator[tuple[pb.Chunk, memoryview]]:
    """A flat tensor in pieces of at most CHUNK_BYTES, at least one; the last is marked.

    offset: in bytes, of `flat` in the tensor that it is a part of.
    """
    data = raw_bytes(flat)
    for start in range(0, max(len(data), 1), CHUNK_BYTES):
        stop = start + CHUNK_BYTES
        last = stop >= len(data)
        chunk = pb.Chunk(step=step, slot=slot, name=name, offset=offset + start, last=last, compressed=compressed)
        yield chunk, data[start:stop]
