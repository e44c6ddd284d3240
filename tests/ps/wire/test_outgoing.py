"""Whatever parts of a sum go first, a server gets its shard of it once, and whole."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ps.memory.raw import raw_bytes
from ps.numerics.ranges import gaps
from ps.parameters.layout import build_layout, shards
from ps.wire.chunks import place
from ps.wire.outgoing import Outgoing
from steepest.v1 import exchange_pb2 as pb
from tests.support.models import described

LAYOUT = build_layout(described([(140_000,)]))
RANGES = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)).map(sorted).map(tuple), max_size=6)


@given(st.tuples(st.integers(0, 100), st.integers(0, 100)), RANGES)
def test_gaps_are_what_nothing_takes(whole: tuple[int, int], taken: list[tuple[int, int]]) -> None:
    left = set(range(*whole)) - {i for first, last in taken for i in range(first, last)}
    found = gaps(*whole, taken)
    assert found == sorted(found)
    assert [i for first, last in found for i in range(first, last)] == sorted(left)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, LAYOUT.numel), st.integers(0, LAYOUT.numel)), max_size=6))
def test_parts_and_the_rest_make_the_sum(parts: list[tuple[int, int, int]]) -> None:
    shard = shards(LAYOUT, 2)[1]
    received = torch.zeros(3, shard.numel)
    num_bytes = [0, 0, 0]
    sums = torch.randn(3, LAYOUT.numel)

    def send(message: pb.WorkerMessage, data: memoryview) -> None:
        slot = message.chunk.slot
        place(received[slot], message.chunk, len(data))[:] = data
        num_bytes[slot] += len(data)

    outgoing = Outgoing(shard, send)
    for step in (3, 4):
        num_bytes[:] = [0, 0, 0]
        received.zero_()
        for slot, start, stop in parts:
            outgoing.part(step, slot, sums[slot], start, stop)
        for slot in (2, 0):
            outgoing.rest(step, slot, sums[slot])
            assert num_bytes[slot] == len(raw_bytes(received[slot]))
            assert torch.equal(received[slot], sums[slot, shard.start : shard.stop])


def test_each_piece_is_prepared_before_it_goes() -> None:
    shard = shards(LAYOUT, 2)[1]
    log: list[tuple[str, int, int]] = []

    def send(message: pb.WorkerMessage, data: memoryview) -> None:
        start = shard.start + message.chunk.offset // 4
        log.append(("sent", start, start + len(data) // 4))

    outgoing = Outgoing(shard, send)
    total = torch.zeros(LAYOUT.numel)
    outgoing.part(0, 0, total, shard.start + 64, shard.start + 128)
    outgoing.rest(0, 0, total, lambda start, stop: log.append(("prepared", start, stop)))
    first, second = (shard.start, shard.start + 64), (shard.start + 128, shard.stop)
    expected = [("prepared", *first), ("sent", *first), ("prepared", *second), ("sent", *second)]
    assert log == [("sent", shard.start + 64, shard.start + 128), *expected]
