"""Lossy codecs: what gradients and updates become on the network when a job asks for compression.

A codec takes what it sends out of the tensor it is given, so that what is left there is the residual, which goes into
the next call (error feedback: Seide et al. 2014; Karimireddy et al. 2019, "Error Feedback Fixes SignSGD"). What is sent
and what is left add up to what there was, to one rounding. All of it is deterministic, and works on blocks of the
layout or on whole parameters, so that a cut into shards shows in no bit.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ps.parameters.layout import Layout, Placed
from steepest.spec import CompressionSpec

_CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Codec(Protocol):
    """One way to make a tensor over a range of the layout small. Payloads are uint8 tensors of a fixed length."""

    state_numel: int  # elements it keeps of every residual from call to call, besides the residual

    def initial_state(self) -> torch.Tensor:
        """The state before the first call, shape (state_numel,)."""

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Which bytes of the whole layout's payload the elements [start, stop) need. Both are at blocks' bounds."""

    def encode(self, values: torch.Tensor, payload: torch.Tensor, state: torch.Tensor, start: int = 0) -> None:
        """Write the payload of `values`, which begin at `start`, and leave in them what it does not say.

        payload: shape (bytes of the span,). state: shape (state_numel,), updated.
        """

    def decode(self, payload: torch.Tensor, into: torch.Tensor, start: int = 0) -> None:
        """Add what a payload says to `into`, which begins at `start`."""


class Cast:
    """A shorter floating-point type. What is beyond its range is sent as its largest number."""

    state_numel = 0

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        self._layout = layout
        self._dtype = dtype
        self._largest = torch.finfo(dtype).max

    def initial_state(self) -> torch.Tensor:
        """See Codec."""
        return torch.empty(0, dtype=self._layout.dtype)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """See Codec."""
        return start * self._dtype.itemsize, stop * self._dtype.itemsize

    def encode(self, values: torch.Tensor, payload: torch.Tensor, state: torch.Tensor, start: int = 0) -> None:
        """See Codec."""
        sent = payload.view(self._dtype)
        sent.copy_(values)
        sent.clamp_(-self._largest, self._largest)
        values.sub_(sent)

    def decode(self, payload: torch.Tensor, into: torch.Tensor, start: int = 0) -> None:
        """See Codec."""
        into.add_(payload.view(self._dtype))


def codec_of(name: str, compression: CompressionSpec, layout: Layout, seed: int) -> Codec:
    """The codec behind a name of `compression.name` or `compression.pull`. seed: the job's.

    Kernels are compiled when their module is first imported, so only a job that needs them does.
    """
    match name:
        case "topk":
            from ps.compression.topk import TopK

            return TopK(layout, compression.top_ratio)
        case "twobit":
            from ps.compression.twobit import TwoBit

            return TwoBit(layout)
        case "powersgd":
            from ps.compression.powersgd import LowRank

            return LowRank(layout, compression.low_rank, seed)
        case _:
            return Cast(layout, _CASTS[name])


def thin_shape(placed: Placed, rank: int) -> tuple[int, int]:
    """(rows, columns) of a parameter as a matrix; (0, 0) when two thin ones of this rank would not be smaller."""
    rows = placed.shape[0] if len(placed.shape) > 1 and placed.numel else 0
    columns = placed.numel // rows if rows else 0
    return (rows, columns) if rank * (rows + columns) < placed.numel else (0, 0)


def compression_problem(compression: CompressionSpec, layout: Layout) -> str:
    """Why a compression is of no use for a model, or nothing."""
    if compression.name != "powersgd":
        return ""
    rank = compression.low_rank
    matrices = [p for p in layout.parameters if len(p.shape) > 1 and p.numel]
    if any(thin_shape(p, rank) != (0, 0) for p in matrices):
        return ""
    if not matrices:
        return "the model has no matrix, which is all it makes smaller; allowed: none, bf16, fp16, topk, twobit"
    return f"compression.rank = {rank} makes none of the model's matrices smaller; use a smaller one"


def push_codec(compression: CompressionSpec, layout: Layout, seed: int) -> Codec | None:
    """What gradients are sent in, None for as they are."""
    return codec_of(compression.name, compression, layout, seed) if compression.is_on else None


def pull_codec(compression: CompressionSpec, layout: Layout, seed: int) -> Codec | None:
    """What updates are sent in, None for whole parameters."""
    name = compression.pull_name
    return codec_of(name, compression, layout, seed) if compression.is_on and name != "none" else None
