"""What every codec promises, on random tensors: nothing is lost, and a cut into shards shows in no bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.compression.choose import codec_of, compression_problem
from ps.compression.codec import Codec
from ps.compression.powersgd import LowRank
from ps.compression.topk import TopK
from ps.parameters.layout import BLOCK_NUMEL, Layout, build_layout, shards
from steepest.spec import CompressionSpec
from tests.support.models import described

NAMES = ("bf16", "fp16", "topk", "twobit", "powersgd")
SHAPES = [(300, 400), (7,), (500, 300), (64, 3, 5), (1,), (0,)]
EPSILON = {"float32": 1e-6, "float64": 1e-14}


def made(name: str, dtype: str = "float32") -> tuple[Codec, Layout]:
    layout = build_layout(described(SHAPES, dtype))
    return codec_of(name, CompressionSpec(name=name, rank=3 if name == "powersgd" else None), layout, seed=0), layout


def random(layout: Layout, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Values of all sizes, zeros in the padding as gradients have."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.zeros(layout.numel, dtype=layout.dtype)
    for view in layout.views(flat):
        sizes = torch.exp(2 * torch.randn(view.shape, generator=generator, dtype=layout.dtype))
        view.copy_(scale * sizes * torch.randn(view.shape, generator=generator, dtype=layout.dtype))
    return flat


def payload_of(codec: Codec, layout: Layout) -> torch.Tensor:
    return torch.empty(codec.span(0, layout.numel)[1], dtype=torch.uint8)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e6, 1e20]))
def test_what_is_sent_and_what_is_left_add_up(name: str, dtype: str, seed: int, scale: float) -> None:
    codec, layout = made(name, dtype)
    before = random(layout, seed, scale)
    rest, payload, sent = before.clone(), payload_of(codec, layout), torch.zeros_like(before)
    codec.encode(rest, payload, codec.initial_state())
    codec.decode(payload, sent)
    # A low-rank product has numbers as large as the matrix has, also where the matrix is small.
    most = float(before.abs().max())
    torch.testing.assert_close(sent + rest, before, rtol=EPSILON[dtype], atol=EPSILON[dtype] * most)
    assert rest.double().norm() <= before.double().norm() * (1 + 1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_servers", [2, 3, 5])
def test_every_shard_decodes_its_part_of_the_same_bits(name: str, num_servers: int) -> None:
    codec, layout = made(name)
    payload, whole = payload_of(codec, layout), random(layout, 1)
    into = whole.clone()
    codec.encode(random(layout, 2), payload, codec.initial_state())
    codec.decode(payload, whole)
    for shard in shards(layout, num_servers):
        first, last = codec.span(shard.start, shard.stop)
        codec.decode(payload[first:last], into[shard.start : shard.stop], shard.start)
    assert torch.equal(into, whole)


@pytest.mark.parametrize("name", ["bf16", "fp16", "topk", "twobit"])
def test_every_shard_encodes_its_part_of_the_same_bits(name: str) -> None:
    codec, layout = made(name)
    payload, whole = payload_of(codec, layout), random(layout, 3)
    parts, in_parts = whole.clone(), torch.empty_like(payload)
    codec.encode(whole, payload, codec.initial_state())
    for shard in shards(layout, 3):
        first, last = codec.span(shard.start, shard.stop)
        own = parts[shard.start : shard.stop]
        codec.encode(own, in_parts[first:last], codec.initial_state(), shard.start)
    assert torch.equal(in_parts, payload)
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("name", NAMES)
def test_with_the_residual_everything_arrives_in_time(name: str) -> None:
    """The same gradient again and again: the mean of what arrives comes as near to it as time allows."""
    codec, layout = made(name)
    gradient = random(layout, 4)
    payload, state = payload_of(codec, layout), codec.initial_state()
    rest, arrived = torch.zeros_like(gradient), torch.zeros_like(gradient)
    distances = []
    for step in range(1, 201):
        codec.encode(rest.add_(gradient), payload, state)
        codec.decode(payload, arrived)
        distances.append(float((arrived / step - gradient).norm() / gradient.norm()))
    assert distances[-1] < 0.5 * distances[9] or distances[-1] < 1e-6
    most = float(200 * gradient.abs().max())
    torch.testing.assert_close(arrived + rest, 200 * gradient, rtol=1e-5, atol=1e-5 * most)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_a_number_is_not_hidden(name: str) -> None:
    codec, layout = made(name)
    payload, into = payload_of(codec, layout), torch.zeros(layout.numel)
    codec.encode(torch.full_like(into, math.nan), payload, codec.initial_state())
    codec.decode(payload, into)
    assert bool(into.isnan().any())


@pytest.mark.parametrize("name", NAMES)
def test_padding_stays_zero_and_leaves_no_trace(name: str) -> None:
    """Checkpoints have no padding, so nothing may depend on it."""
    codec, layout = made(name)
    payload, into = payload_of(codec, layout), torch.zeros(layout.numel)
    rest = random(layout, 5)
    codec.encode(rest, payload, codec.initial_state())
    codec.decode(payload, into)
    assert len(layout.padding)
    assert not rest[layout.padding].any()
    assert not into[layout.padding].any()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_comes_of_nothing(name: str) -> None:
    codec, layout = made(name)
    payload, into = payload_of(codec, layout), torch.zeros(layout.numel)
    codec.encode(into.clone(), payload, codec.initial_state())
    codec.decode(payload, into)
    assert not into.any()


def test_half_precision_sends_the_rest_of_what_is_too_large_later() -> None:
    codec, layout = made("fp16")
    rest, payload, sent = torch.zeros(layout.numel), payload_of(codec, layout), torch.zeros(layout.numel)
    rest[0] = 100_000.0
    codec.encode(rest, payload, codec.initial_state())
    codec.decode(payload, sent)
    assert (sent[0], rest[0]) == (65_504.0, 34_496.0)


@given(st.integers(0, 2**32), st.sampled_from([0.001, 0.01, 0.37, 0.5]), st.sampled_from(["float32", "float64"]))
@settings(max_examples=30)
def test_top_k_takes_the_largest_of_every_block(seed: int, ratio: float, dtype: str) -> None:
    layout = build_layout(described([(BLOCK_NUMEL + 1000,)], dtype))
    codec = TopK(layout, ratio)
    values = random(layout, seed)
    values[::3] = values[::3].round()  # so that some are equal
    before, payload, sent = values.clone(), payload_of(codec, layout), torch.zeros_like(values)
    codec.encode(values, payload, codec.initial_state())
    codec.decode(payload, sent)
    for block in (slice(0, BLOCK_NUMEL), slice(BLOCK_NUMEL, layout.numel)):
        own = before[block]
        count = math.ceil(len(own) * ratio)
        count = min(len(own), -(-count // 4) * 4)
        taken = sent[block] != 0
        assert torch.equal(sent[block][taken], own[taken])
        smallest = own.abs().topk(count).values[-1]
        assert own[~taken].abs().max() <= smallest
        assert (values[block] != 0).sum() == (own != 0).sum() - taken.sum()


def test_powersgd_finds_a_matrix_of_low_rank() -> None:
    layout = build_layout(described([(60, 80)], "float64"))
    codec = LowRank(layout, 2, seed=0)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (60, 80))
    rest = (left @ right.T).flatten()
    codec.encode(rest, payload_of(codec, layout), codec.initial_state())
    assert rest.norm() < 2**-7 * (left @ right.T).norm(), "no more is left than bfloat16 rounds off"


def test_powersgd_needs_a_matrix_that_it_makes_smaller() -> None:
    vectors, matrices = build_layout(described([(64,), (9,)])), build_layout(described([(64, 10)]))
    spec = CompressionSpec(name="powersgd", rank=9)
    assert "no matrix" in compression_problem(spec, vectors)
    assert "compression.rank = 9 makes none" in compression_problem(spec, matrices)
    assert not compression_problem(CompressionSpec(name="powersgd", rank=8), matrices)
    assert not compression_problem(CompressionSpec(name="topk"), vectors)


@pytest.mark.parametrize(("name", "most"), [("bf16", 0.5), ("topk", 0.0151), ("twobit", 0.0704), ("powersgd", 0.016)])
def test_how_small_payloads_are(name: str, most: float) -> None:
    layout = build_layout(described([(1024, 1024)]))
    codec = codec_of(name, CompressionSpec(name=name), layout, seed=0)
    assert codec.span(0, layout.numel)[1] <= most * layout.nbytes
