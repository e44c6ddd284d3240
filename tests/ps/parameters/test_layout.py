from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ps.parameters.layout import BLOCK_NUMEL, build_layout, choose_num_servers, shards
from tests.support.models import described

SHAPES = st.lists(st.lists(st.integers(0, 700), min_size=0, max_size=2).map(tuple), min_size=1, max_size=8).filter(
    lambda shapes: any(math.prod(s) for s in shapes)
)


@given(SHAPES, st.sampled_from(["float32", "float64"]), st.booleans())
def test_every_parameter_is_aligned_and_none_overlap(
    shapes: list[tuple[int, ...]], dtype: str, decay_biases_and_norms: bool
) -> None:
    layout = build_layout(described(shapes, dtype), decay_biases_and_norms=decay_biases_and_norms)
    assert all(p.offset * layout.itemsize % 64 == 0 for p in layout.parameters)
    taken = sorted((p.offset, p.offset + p.numel) for p in layout.parameters)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(taken))
    assert max(stop for _, stop in taken) <= layout.numel
    assert {p.name for p in layout.parameters} == {f"p{i}" for i in range(len(shapes))}
    assert [(g.start, g.stop) for g in layout.groups] == sorted((g.start, g.stop) for g in layout.groups)
    assert all((len(p.shape) >= 2 or decay_biases_and_norms) == p.decayed for p in layout.parameters)


@given(SHAPES, st.integers(1, 9))
def test_shards_own_whole_blocks_and_everything_once(shapes: list[tuple[int, ...]], num_servers: int) -> None:
    layout = build_layout(described(shapes))
    cut = shards(layout, num_servers)
    assert len(cut) == num_servers
    assert cut[0].start == 0
    assert cut[-1].stop == layout.numel
    assert all(a.stop == b.start for a, b in itertools.pairwise(cut))
    assert all(s.start % BLOCK_NUMEL == 0 or s.start == layout.numel for s in cut)
    assert cut[0].numel > 0 or layout.numel == 0


@given(SHAPES, st.integers(1, 5))
def test_segments_do_not_depend_on_the_number_of_shards(shapes: list[tuple[int, ...]], num_servers: int) -> None:
    layout = build_layout(described(shapes))
    whole, split = (
        [(s.start + start, s.start + stop) for s in shards(layout, count) for start, stop in s.segments]
        for count in (1, num_servers)
    )
    assert whole == split == sorted(whole)
    assert len(whole) == len(layout.segment_owners)
    covered = sorted(i for start, stop in whole for i in range(start, stop))
    assert set(covered) >= {i for p in layout.parameters for i in range(p.offset, p.offset + p.numel)}
    assert len(covered) == len(set(covered))


def test_views_have_the_parameters_own_shapes() -> None:
    layout = build_layout(described([(3, 4), (5,), ()]))
    views = layout.views(torch.arange(layout.numel, dtype=torch.float32))
    assert [tuple(v.shape) for v in views] == [(3, 4), (5,), ()]
    assert [float(v.reshape(-1)[0]) for v in views] == [float(p.offset) for p in layout.parameters]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (described([]), "no trainable parameters"),
        (described([(0, 3)]), "no trainable parameters"),
        (described([(2,)], "float16"), "all float32 or all float64"),
    ],
)
def test_what_cannot_be_trained_is_refused(model: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_layout(model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("numel", "num_hosts", "expected"),
    [(10_000, 4, 1), (50_000_000, 1, 1), (50_000_000, 4, 4), (4_200_000, 500, 65)],
    ids=["small", "one-host", "one-a-host", "no-more-than-blocks"],
)
def test_the_number_of_servers_follows_size_and_hosts(numel: int, num_hosts: int, expected: int) -> None:
    assert choose_num_servers(build_layout(described([(numel,)])), num_hosts) == expected
