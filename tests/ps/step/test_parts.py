from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ps.step.parts import redeal

WORKERS = st.lists(st.sampled_from("abcdef"), unique=True)
OWNERS = st.lists(st.one_of(st.none(), st.sampled_from("abcdef")), min_size=1, max_size=12)


@given(OWNERS, WORKERS)
def test_shares_are_equal_and_as_little_moves_as_can(owners: list[str | None], workers: list[str]) -> None:
    after = redeal(owners, workers)
    if not workers:
        assert after == owners
        return
    counts = sorted(after.count(worker) for worker in workers)
    assert sum(counts) == len(owners)
    assert counts[-1] - counts[0] <= 1
    kept = sum(new == old for new, old in zip(after, owners, strict=True))
    # No shares as equal as these let more parts stay: the largest holdings get the larger shares.
    holdings = sorted((owners.count(worker) for worker in workers), reverse=True)
    assert kept == sum(min(had, share) for had, share in zip(holdings, reversed(counts), strict=True))


@given(OWNERS, WORKERS)
def test_what_is_dealt_well_stays(owners: list[str | None], workers: list[str]) -> None:
    after = redeal(owners, workers)
    assert redeal(after, workers) == after
