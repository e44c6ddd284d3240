from __future__ import annotations

import math

import pytest
import torch

from ps.compression.choose import codec_of
from ps.numerics.tree import Node
from ps.parameters.layout import build_layout
from steepest.spec import CompressionSpec
from tests.support.models import described
from worker.gradients.compressor import Compressor

LAYOUT = build_layout(described([(100, 100), (100,)]))


def compressor(name: str = "powersgd", part_leaves: int = 2, num_leaves: int = 7) -> Compressor:
    codec = codec_of(name, CompressionSpec(name=name), LAYOUT, seed=0)
    return Compressor(codec, LAYOUT, part_leaves, num_leaves)


def test_ranges_are_whole_parts() -> None:
    it = compressor()
    assert it.parts(2, 7) == {1: Node(2, 4), 2: Node(4, 6), 3: Node(6, 7)}
    for low, high in ((1, 4), (2, 5)):
        with pytest.raises(ValueError, match="no whole parts of 2"):
            it.parts(low, high)


@pytest.mark.parametrize("name", ["bf16", "topk", "twobit", "powersgd"])
def test_what_was_not_sent_goes_into_the_next_step(name: str) -> None:
    it = compressor(name)
    codec = codec_of(name, CompressionSpec(name=name), LAYOUT, seed=0)
    generator = torch.Generator().manual_seed(0)
    total, arrived = torch.zeros(LAYOUT.numel), torch.zeros(LAYOUT.numel)
    for _ in range(5):
        gradient = torch.randn(LAYOUT.numel, generator=generator)
        gradient[LAYOUT.padding] = 0
        total += gradient
        it.compress(1, gradient)
        codec.decode(it.payload(1), arrived)
    torch.testing.assert_close(arrived + it.residual(1)[: LAYOUT.numel], total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["bf16", "fp16", "topk", "twobit", "powersgd"])
def test_a_gradient_that_is_not_finite_is_told_and_leaves_no_trace(name: str, bad: float) -> None:
    it = compressor(name)
    codec = codec_of(name, CompressionSpec(name=name), LAYOUT, seed=0)
    it.compress(0, torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(0)))
    before = it.residual(0).clone()
    gradient = torch.zeros(LAYOUT.numel)
    gradient[5] = bad
    it.compress(0, gradient)
    arrived = torch.zeros(LAYOUT.numel)
    codec.decode(it.payload(0), arrived)
    assert bool(arrived.isnan().any())
    assert torch.equal(it.residual(0), before)


def test_parts_of_others_are_forgotten() -> None:
    it = compressor("bf16")
    it.compress(0, torch.full((LAYOUT.numel,), 1 / 3))
    it.compress(1, torch.full((LAYOUT.numel,), 1 / 3))
    it.keep([1])
    assert it.residual(1).any()
    assert not it.residual(0).any()
