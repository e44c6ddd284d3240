from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ps.numerics.reduce_cpu import Reducer
from ps.numerics.threads import Threads, split
from ps.numerics.tree import Node, addition_plan
from ps.parameters.layout import BLOCK_NUMEL, Shard, build_layout, shards
from tests.support.models import described

MODEL = described([(300, 400), (400,), (90_000,), (7,)])


def _gradients(count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    layout = build_layout(described([p.shape for p in MODEL.parameters], str(dtype).removeprefix("torch.")))
    generator = torch.Generator().manual_seed(0)
    flats = []
    for _ in range(count):
        flat = torch.zeros(layout.numel, dtype=dtype)
        for view in layout.views(flat):
            view.copy_(torch.randn(view.shape, generator=generator, dtype=torch.float64))
        flats.append(flat)
    return flats


def _reducer(shard: Shard, num_threads: int = 1) -> Reducer:
    ranges = split(shard, num_threads)
    return Reducer(shard, Threads(len(ranges)), ranges)


@pytest.mark.parametrize("num_nodes", [1, 2, 5])
def test_threads_do_not_show_in_the_bits(num_nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ps.numerics.threads.MIN_NUMEL", BLOCK_NUMEL)
    layout = build_layout(described([(1_000, 900), (900,), (400_000,)]))
    (shard,) = shards(layout, 1)
    nodes = [Node(i, i + 1) for i in range(num_nodes)]
    plan, root = addition_plan(Node(0, num_nodes), dict.fromkeys(nodes, True))
    results = []
    for num_threads in (1, 4):
        generator = torch.Generator().manual_seed(0)
        gradients = {node: torch.randn(layout.numel, generator=generator) for node in nodes}
        assert len(split(shard, num_threads)) == num_threads
        sums = _reducer(shard, num_threads)(plan, root, gradients)
        results.append((sums.tobytes(), gradients[nodes[0]]))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_servers", [1, 2, 3, 7])
def test_sum_and_norms_have_the_same_bits_for_any_number_of_shards(num_servers: int, dtype: torch.dtype) -> None:
    layout = build_layout(described([p.shape for p in MODEL.parameters], str(dtype).removeprefix("torch.")))
    gradients = _gradients(3, dtype)
    reference = (gradients[0] + gradients[1]) + gradients[2]
    nodes = [Node(0, 1), Node(1, 2), Node(2, 3)]
    plan, root = addition_plan(Node(0, 3), dict.fromkeys(nodes, True))
    total = np.concatenate(
        [
            _reducer(shard)(plan, root, {n: g[shard.start : shard.stop] for n, g in zip(nodes, gradients, strict=True)})
            for shard in shards(layout, num_servers)
        ]
    )
    assert torch.equal(gradients[0], reference)
    exact = [math.fsum(float(x) ** 2 for x in view.double().reshape(-1)) for view in layout.views(reference)]
    by_parameter = np.zeros(len(layout.parameters))
    np.add.at(by_parameter, list(layout.segment_owners), total)
    assert by_parameter == pytest.approx(exact, rel=1e-13)
    one = np.concatenate([_measure(shard, reference) for shard in shards(layout, 1)])
    assert total.tobytes() == one.tobytes()


def _measure(shard: Shard, flat: torch.Tensor) -> np.ndarray:
    return _reducer(shard)([], Node(0, 1), {Node(0, 1): flat})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, BLOCK_NUMEL - 1, BLOCK_NUMEL, 120_500])
def test_one_bad_element_shows_in_its_own_segment_only(bad: float, place: int) -> None:
    layout = build_layout(MODEL)
    flat = _gradients(1, torch.float32)[0]
    flat[place] = bad
    (shard,) = shards(layout, 1)
    sums = _measure(shard, flat)
    (broken,) = np.flatnonzero(~np.isfinite(sums))
    owner = layout.parameters[layout.segment_owners[broken]]
    assert owner.offset <= place < owner.offset + owner.numel


def test_the_square_of_a_huge_float32_is_still_finite() -> None:
    layout = build_layout(described([(4,)]))
    flat = torch.zeros(layout.numel)
    flat[:4] = 3e38
    (shard,) = shards(layout, 1)
    assert np.isfinite(_measure(shard, flat)).all()
