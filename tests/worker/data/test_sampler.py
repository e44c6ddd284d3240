from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from steepest.change_spec import ChangeSpec
from steepest.spec import DataSpec
from worker.data.sampler import Sampler

SIZES = st.integers(1, 400)


@given(SIZES, st.integers(1, 90), st.data(), st.booleans(), st.integers(0, 2**62))
def test_an_epoch_visits_every_sample_once(
    num_samples: int, global_batch: int, data: st.DataObject, shuffle: bool, seed: int
) -> None:
    micro_batch = data.draw(st.one_of(st.none(), st.integers(1, global_batch)))
    spec = DataSpec(global_batch=global_batch, micro_batch=micro_batch, shuffle=shuffle)
    sampler = Sampler(num_samples, spec, seed)
    for epoch in range(2):
        first = epoch * sampler.steps_per_epoch
        steps = [
            np.concatenate([sampler.indices(step, m) for m in range(spec.num_micro_batches)])
            for step in range(first, first + sampler.steps_per_epoch)
        ]
        assert sorted(np.concatenate(steps)) == list(range(num_samples))
        assert all(len(s) == global_batch for s in steps[:-1])
        assert 1 <= len(steps[-1]) <= global_batch


@given(st.sets(st.integers(0, 99)), st.integers(0, 30), st.booleans())
def test_samples_are_left_out_from_a_step_on(skipped: set[int], since: int, shuffle: bool) -> None:
    spec = DataSpec(global_batch=16, shuffle=shuffle)
    changes = [ChangeSpec(step=since, skip_samples=tuple(skipped)), ChangeSpec(step=since, lr_scale=0.5)]
    plain, sampler = Sampler(100, spec, 1), Sampler(100, spec, 1, changes=changes)
    for step in range(40):
        for m in range(spec.num_micro_batches):
            every = plain.indices(step, m).tolist()
            left = [i for i in every if step < since or i not in skipped]
            assert sampler.indices(step, m).tolist() == (left if left == every or 2 * len(left) > len(every) else [])


@given(st.integers(2, 300), st.integers(0, 2**62))
def test_indices_are_a_pure_function(num_samples: int, seed: int) -> None:
    spec = DataSpec(global_batch=16)
    one, other = Sampler(num_samples, spec, seed), Sampler(num_samples, spec, seed)
    places = [(step, m) for step in range(40) for m in range(8)]
    forwards = {place: one.indices(*place).tolist() for place in places}
    backwards = {place: other.indices(*place).tolist() for place in reversed(places)}
    assert forwards == backwards


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    spec = DataSpec(global_batch=100, micro_batch=100)
    orders = {tuple(Sampler(100, spec, seed).indices(epoch, 0)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_without_shuffling_samples_come_in_order() -> None:
    sampler = Sampler(10, DataSpec(global_batch=4, micro_batch=2, shuffle=False), 0)
    assert [sampler.indices(s, m).tolist() for s in range(3) for m in range(2)] == [
        [0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [],
    ]  # fmt: skip


@given(SIZES, st.integers(1, 100))
def test_an_evaluation_covers_everything_once(num_samples: int, size: int) -> None:
    sampler = Sampler(num_samples, DataSpec(evaluation_batch=size), 0)
    ranges = [sampler.evaluation_range(c) for c in range(-(-num_samples // size))]
    assert [i for low, high in ranges for i in range(low, high)] == list(range(num_samples))
