from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ps.numerics import reduce_gpu as device_reduction
from ps.numerics.reduce_cpu import Reducer
from ps.numerics.reduce_gpu import DeviceReducer, wide_squares
from ps.numerics.threads import Threads
from ps.numerics.tree import Node, addition_plan
from ps.parameters.layout import BLOCK_NUMEL, Layout, build_layout, shards
from tests.support.choices import full
from tests.support.models import described

SHAPES = [(700, 400), (400,), (3,), (1,), (400, 30)]
LAYOUTS = {
    "float32": build_layout(described(SHAPES, "float32")),
    "float64": build_layout(described(SHAPES, "float64")),
    "small": build_layout(described([(7,), (3, 3)], "float32")),
    "whole": build_layout(described(SHAPES, "float32"), is_whole=True),  # its shards begin anywhere
    "block": build_layout(described([(65_536,), (70_000,), (65_000,), (1_100,)], "float32")),
}
ROOT = Node(0, 4)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")),
]


def _gradients(layout: Layout, seed: int, present: tuple[bool, ...]) -> dict[Node, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {Node(i, i + 1): torch.randn(layout.numel, generator=generator, dtype=layout.dtype) for i in range(4)}
    for value in made.values():
        value[layout.padding] = 0.0
    return {node: value for node, value in made.items() if present[node.low]}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["float32", "whole", *map(full, ("float64", "small", "block"))])
@given(st.integers(0, 9), st.tuples(*[st.booleans()] * 4), st.integers(1, 7))
def test_sums_are_those_of_the_cpus_kernel_and_no_cut_shows(
    device: str, name: str, seed: int, present: tuple[bool, ...], num_servers: int
) -> None:
    layout = LAYOUTS[name]
    given_ = _gradients(layout, seed, present)
    plan, root = addition_plan(ROOT, {Node(i, i + 1): here for i, here in enumerate(present)})
    (whole,) = shards(layout, 1)
    expected_sum = {node: value.clone() for node, value in given_.items()}
    expected = Reducer(whole, Threads(1), [(0, whole.numel)])(plan, root, expected_sum)
    measured, sums = [], []
    for shard in shards(layout, num_servers):
        own = {node: value[shard.start : shard.stop].to(device, copy=True) for node, value in given_.items()}
        measured += DeviceReducer(shard, torch.device(device))(plan, root, own).tolist()
        sums.append(own[root].cpu() if root is not None else torch.empty(0))
    one = {node: value.to(device, copy=True) for node, value in given_.items()}
    alone = DeviceReducer(whole, torch.device(device))(plan, root, one)
    assert measured == alone.tolist()
    assert measured == pytest.approx(expected.tolist(), rel=1e-6 if layout.dtype == torch.float32 else 1e-13)
    if root is not None:
        assert torch.equal(torch.cat(sums), expected_sum[root])
        wide = wide_squares(whole, one[root], torch.device(device))
        assert wide.tolist() == pytest.approx(expected.tolist(), rel=1e-13)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_numel", [device_reduction.CHUNK_NUMEL, BLOCK_NUMEL])
@pytest.mark.parametrize("scale", [1e25, 1e-16, 1e-25])
def test_squares_that_float32_cannot_hold_are_measured_in_float64(
    monkeypatch: pytest.MonkeyPatch, device: str, chunk_numel: int, scale: float
) -> None:
    monkeypatch.setattr(device_reduction, "CHUNK_NUMEL", chunk_numel)
    layout = LAYOUTS["float32"]
    (whole,) = shards(layout, 1)
    gradient = _gradients(layout, 0, (True, False, False, False))[ROOT.halves()[0].halves()[0]] * scale
    expected = Reducer(whole, Threads(1), [(0, whole.numel)])([], ROOT, {ROOT: gradient.clone()})
    sums = DeviceReducer(whole, torch.device(device))([], ROOT, {ROOT: gradient.to(device)})
    if scale == 1e-25:  # nothing of it is left in float32: documented
        assert not sums.any()
    else:
        assert sums.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_what_is_not_finite_is_seen_and_what_is_large_is(device: str, value: float) -> None:
    layout = LAYOUTS["float32"]
    (shard,) = shards(layout, 1)
    gradient = torch.zeros(layout.numel, device=device)
    gradient[70_000] = value
    sums = DeviceReducer(shard, torch.device(device))([], ROOT, {ROOT: gradient})
    assert [bool(torch.isfinite(torch.tensor(s))) for s in sums] == [
        not start <= 70_000 < stop or value == 3e38 for start, stop in shard.segments
    ]
    assert (sums != 0).sum() == 1
