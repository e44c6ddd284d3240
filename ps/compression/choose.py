"""Which codec a spec asks for, and whether it is of any use for a model."""

from __future__ import annotations

import torch

from ps.compression.codec import Cast, Codec
from ps.compression.matrices import thin_shape
from ps.parameters.layout import Layout
from steepest.spec import CompressionSpec

_CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
