"""Sums that are published in buckets are the sums that are published as a whole, and nothing is written afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ps.numerics.ranges import gaps
from ps.parameters.layout import build_layout
from ps.step.messages import Assign, Push, Ready, Round
from steepest.spec import spec_from_dict
from steepest.task import Task
from tests.support import tasks
from tests.support.models import described
from worker.data.sampler import Sampler
from worker.gradients import buckets as overlap
from worker.gradients.analytic import AnalyticEngine
from worker.gradients.backend import CpuBackend
from worker.gradients.batches import Batches
from worker.gradients.buckets import cut_buckets
from worker.gradients.compute import Computer
from worker.gradients.slots import Slots, num_slots
from worker.gradients.torch_engine import TorchEngine
from worker.task.model import describe_model, num_samples

BUCKET_BYTES = 4096


class FarBackend(CpuBackend):
    """As a GPU's: sums grow elsewhere, and what is published of them comes in the end."""

    publishes = True

    def __init__(self) -> None:
        self.published: list[tuple[torch.Tensor, torch.Tensor]] = []

    def gradient(self, shared: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(shared)

    def publish(self, gradient: torch.Tensor, shared: torch.Tensor, start: int, stop: int) -> None:
        self.published.append((shared[start:stop], gradient[start:stop].clone()))

    def wait(self) -> None:
        for shared, gradient in self.published:
            assert shared.isnan().all(), "something was published twice"
            shared.copy_(gradient)
        self.published.clear()


class Worker:
    """Computes a task's gradients without servers. announced: what was said to be ready, with a copy of it."""

    def __init__(self, make: Callable[[], Any], backend: CpuBackend | None = None) -> None:
        torch.manual_seed(0)
        task = make()
        self.spec = spec_from_dict(
            {"task": {"module": "m", "function": "f"}, "steps": 10, "data": {"global_batch": 24, "micro_batch": 3}}
        )
        self.layout = build_layout(describe_model(task))
        self.backend = CpuBackend() if backend is None else backend
        engine: Any = (
            TorchEngine(task, describe_model(task), self.layout, self.backend)
            if isinstance(task, Task)
            else AnalyticEngine(task, self.layout)
        )
        flat = torch.zeros(self.layout.numel, dtype=self.layout.dtype)
        engine.write_initial(flat)
        engine.bind(flat)
        shape = num_slots(self.spec.data.num_micro_batches), self.layout.numel
        self.slots = torch.zeros(shape, dtype=self.layout.dtype)
        batches = Batches(self.spec, engine, self.backend, num_samples(task.train_data, "train_data"), 0)
        slots = Slots(self.slots, self.layout, self.backend)
        self.computer = Computer(engine, self.layout, slots, batches, self.spec.data.num_micro_batches)
        self.announced: list[tuple[Ready, torch.Tensor]] = []

    def overlap(self) -> None:
        self.computer.overlap(lambda ready: self.announced.append((ready, self.part(ready).clone())))

    def part(self, ready: Ready) -> torch.Tensor:
        return self.slots[ready.slot, ready.start : ready.stop]

    def train(self, step: int, *ranges: tuple[int, int]) -> Push:
        self.announced.clear()
        return self.computer.answer(Assign(step, Round.TRAIN, ranges), b"")

    def sums(self, push: Push) -> dict[tuple[int, int], torch.Tensor]:
        return {(n.low, n.high): self.slots[n.slot].clone() for n in push.nodes if n.slot is not None}


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "BUCKET_BYTES", BUCKET_BYTES)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=12), st.integers(1, 20_000))
def test_buckets_are_whole_parameters_and_all_of_the_layout(sizes: list[int], min_bytes: int) -> None:
    layout = build_layout(described([(size,) for size in [*sizes, 1]]))
    buckets = cut_buckets(layout, min_bytes)
    assert [stop for _, stop in buckets[:-1]] == [start for start, _ in buckets[1:]]
    assert (buckets[0][0], buckets[-1][1]) == (0, layout.numel)
    assert {start for start, _ in buckets} <= {p.offset for p in layout.parameters}
    assert all((stop - start) * layout.itemsize >= min_bytes for start, stop in buckets[:-1])


@pytest.mark.parametrize("make", [lambda: tasks.deep(width=70), tasks.regression, tasks.least_squares])
@pytest.mark.parametrize("ranges", [[(0, 8)], [(0, 3), (3, 8)], [(1, 2), (2, 7)], [(7, 8)]])
def test_buckets_do_not_show_in_the_bits(make: Callable[[], Any], ranges: list[tuple[int, int]]) -> None:
    """Step 4 is the ragged end of an epoch: most of its micro-batches are empty."""
    whole, cut = Worker(make), Worker(make)
    cut.overlap()
    for step in (0, 1, 4):
        pushes = [worker.train(step, *ranges) for worker in (whole, cut)]
        sums = [worker.sums(push) for worker, push in zip((whole, cut), pushes, strict=True)]
        assert sums[0].keys() == sums[1].keys()
        assert all(torch.equal(sums[0][node], sums[1][node]) for node in sums[0])
        assert pushes[0].leaves == pushes[1].leaves
        assert pushes[0].buffers == pushes[1].buffers


def test_what_is_announced_is_all_of_a_sum_from_the_end_and_stays_as_it_is() -> None:
    worker = Worker(lambda: tasks.deep(width=70))
    worker.overlap()
    push = worker.train(0, (0, 6), (7, 8))
    assert [(n.low, n.high) for n in push.nodes] == [(0, 4), (4, 6), (7, 8)]
    for node in push.nodes:
        own = [(ready, values) for ready, values in worker.announced if (ready.low, ready.high) == node[:2]]
        assert all(ready.slot == node.slot and ready.step == 0 for ready, _ in own)
        assert len(own) == 3
        assert [ready.start for ready, _ in own] == sorted((ready.start for ready, _ in own), reverse=True)
        assert gaps(0, worker.layout.numel, [(ready.start, ready.stop) for ready, _ in own]) == []
        assert all(torch.equal(worker.part(ready), values) for ready, values in own)


def test_a_sum_that_grows_elsewhere_is_published_in_buckets_too() -> None:
    near, far = Worker(lambda: tasks.deep(width=70)), Worker(lambda: tasks.deep(width=70), FarBackend())
    far.slots.fill_(torch.nan)
    far.computer.overlap()
    expected, sums = near.sums(near.train(0, (0, 7))), far.sums(far.train(0, (0, 7)))
    assert expected.keys() == sums.keys()
    assert all(torch.equal(expected[node], sums[node]) for node in expected)


def test_what_is_small_goes_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "BUCKET_BYTES", 1 << 20)
    worker = Worker(tasks.regression)
    worker.overlap()
    worker.train(0, (0, 8))
    assert worker.announced == []


@pytest.mark.parametrize("width", [50, 200], ids=["small", "large"])
def test_a_gradient_that_comes_in_parts_is_all_there(width: int) -> None:
    """What was added or announced too early is made again, in another slot, and not too early from then on."""

    def make() -> Any:
        return tasks.checkpointed_twice(width)

    whole, cut = Worker(make), Worker(make)
    cut.overlap()
    for step, stop in ((0, 1), (1, 4)):
        pushes = [worker.train(step, (0, stop)) for worker in (whole, cut)]
        sums = [worker.sums(push)[0, stop] for worker, push in zip((whole, cut), pushes, strict=True)]
        assert torch.equal(*sums)
        assert pushes[0].leaves == pushes[1].leaves
        slot = pushes[1].nodes[0].slot
        covered = [(ready.start, ready.stop) for ready, _ in cut.announced if ready.slot == slot]
        assert gaps(0, cut.layout.numel, covered) == []
        assert (len(covered) < len(cut.announced)) == (step == 0), "the second step was made once"
        assert all(torch.equal(cut.part(r), values) for r, values in cut.announced if r.slot == slot)
    leaves = [Worker(make) for _ in range(4)]
    one, two, three, four = (leaf.sums(leaf.train(1, (i, i + 1)))[i, i + 1] for i, leaf in enumerate(leaves))
    assert torch.equal((one + two) + (three + four), sums[0]), "the bits depend on the cut"
    torch.manual_seed(0)
    task = make()
    inputs, targets = task.train_data.arrays
    sampler = Sampler(len(inputs), whole.spec.data, whole.spec.seed)
    for index in range(4):
        chosen = torch.from_numpy(sampler.indices(1, index))
        (task.loss(task.model(inputs[chosen]), targets[chosen]) * len(chosen)).backward()
    gradients = {name: p.grad for name, p in task.model.named_parameters()}
    for placed, view in zip(whole.layout.parameters, whole.layout.views(sums[0]), strict=True):
        torch.testing.assert_close(view, gradients[placed.name], rtol=1e-5, atol=1e-6)


def test_a_diagnosis_too_waits_for_gradients_that_come_in_parts() -> None:
    worker = Worker(lambda: tasks.checkpointed_twice(200))
    worker.overlap()
    push = worker.computer.answer(Assign(0, Round.DIAGNOSE, ((0, 2),)), b"")
    assert [(leaf.leaf, leaf.samples, leaf.nonfinite) for leaf in push.leaves] == [(0, 3, ""), (1, 3, "")]
    assert worker.announced == []
