"""Gradients that a worker computes, against autograd on the whole batch, and the canonical tree in its slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ps.numerics.tree import Node
from ps.parameters.layout import Layout, build_layout
from ps.step.messages import Assign, Push, Round
from steepest.spec import TrainingJobSpec, spec_from_dict
from tests.support import tasks
from worker.data.sampler import Sampler
from worker.gradients.analytic import AnalyticEngine
from worker.gradients.backend import CpuBackend
from worker.gradients.batches import Batches
from worker.gradients.compute import Computer, MicroBatchError
from worker.gradients.engine import LossError
from worker.gradients.slots import Slots, num_slots
from worker.gradients.torch_engine import TorchEngine
from worker.task.model import describe_model, num_samples


def _spec(**raw: Any) -> TrainingJobSpec:
    return spec_from_dict(
        {"task": {"module": "m", "function": "f"}, "steps": 10, "placement": {"max_workers": 8}, **raw}
    )


def _computer(make: Any, spec: TrainingJobSpec) -> tuple[Computer, torch.Tensor, Layout, torch.Tensor]:
    torch.manual_seed(0)
    task = make() if callable(make) else make
    description = describe_model(task)
    layout = build_layout(description)
    count = num_slots(spec.data.num_micro_batches)
    slots = torch.full((count, layout.numel), torch.nan, dtype=layout.dtype)
    backend = CpuBackend()
    is_torch = hasattr(task, "model")
    engine: Any = (
        TorchEngine(task, description, layout, backend, spec.precision) if is_torch else AnalyticEngine(task, layout)
    )
    flat = torch.zeros(layout.numel, dtype=layout.dtype)
    engine.write_initial(flat)
    for slot in slots:
        for view in layout.views(slot):
            view.fill_(torch.nan)
        slot[~_mask(layout)] = 0.0
    engine.bind(flat)
    samples = num_samples(task.train_data, "train_data")
    batches = Batches(spec, engine, backend, samples, 0)
    num_leaves = spec.data.num_micro_batches
    computer = Computer(engine, layout, Slots(slots, layout, backend), batches, num_leaves)
    return computer, slots, layout, flat


def noisy() -> Any:
    return tasks.slow(0.0)


def _mask(layout: Layout) -> torch.Tensor:
    mask = torch.zeros(layout.numel, dtype=torch.bool)
    for view in layout.views(mask):
        view.fill_(True)
    return mask


def _train(computer: Computer, step: int, *ranges: tuple[int, int]) -> Push:
    return computer.answer(Assign(step, Round.TRAIN, ranges), b"")


def test_the_sum_is_the_gradient_of_the_whole_batch_and_padding_stays_zero() -> None:
    task = tasks.regression(dtype="float64")
    spec = _spec(data={"global_batch": 32})
    computer, slots, layout, _ = _computer(task, spec)
    push = _train(computer, 0, (0, 8))
    (node,) = push.nodes
    assert (node.low, node.high) == (0, 8)
    assert node.slot is not None
    assert [leaf.samples for leaf in push.leaves] == [4] * 8
    sampler = Sampler(101, spec.data, spec.seed)
    indices = torch.cat([torch.from_numpy(sampler.indices(0, m)) for m in range(8)])
    inputs, targets = task.train_data.arrays
    parameters = dict(task.model.named_parameters())
    loss = task.loss(task.model(inputs[indices]), targets[indices])
    expected = torch.autograd.grad(loss * 32, list(parameters.values()))
    views = dict(zip([p.name for p in layout.parameters], layout.views(slots[node.slot]), strict=True))
    for name, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(views[name], gradient, rtol=1e-11)
    assert (slots[node.slot][~_mask(layout)] == 0).all()
    assert sum(leaf.loss for leaf in push.leaves) == pytest.approx(float(loss.detach()) * 32, rel=1e-12)
    assert all(p.grad is None for p in task.model.parameters())


def test_bf16_runs_the_forward_pass_in_it_and_gives_gradients_of_float32() -> None:
    task = tasks.regression(hidden=300)
    spec = _spec(data={"global_batch": 32}, precision="bf16")
    computer, slots, layout, _ = _computer(task, spec)
    push = _train(computer, 0, (0, 8))
    sampler = Sampler(101, spec.data, spec.seed)
    inputs, targets = task.train_data.arrays
    parameters = dict(task.model.named_parameters())
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    total = 0.0
    for m in range(8):
        chosen = torch.from_numpy(sampler.indices(0, m))
        with torch.autocast("cpu", torch.bfloat16):
            outputs = task.model(inputs[chosen])
            loss = task.loss(outputs, targets[chosen])
        assert outputs.dtype == torch.bfloat16
        total += 4 * float(loss.detach())
        for name, gradient in zip(parameters, torch.autograd.grad(4 * loss, list(parameters.values())), strict=True):
            expected[name] += gradient
    assert push.nodes[0].slot is not None
    views = dict(zip([p.name for p in layout.parameters], layout.views(slots[push.nodes[0].slot]), strict=True))
    for name, gradient in expected.items():
        assert views[name].dtype == torch.float32
        torch.testing.assert_close(views[name], gradient, rtol=1e-5, atol=1e-6)
    assert sum(leaf.loss for leaf in push.leaves) == pytest.approx(total, rel=1e-6)
    full = _train(_computer(tasks.regression(hidden=300), _spec(data={"global_batch": 32}))[0], 0, (0, 8))
    assert sum(leaf.loss for leaf in full.leaves) != pytest.approx(total, rel=1e-6), "autocast changed nothing"


def _total(nodes: dict[Node, torch.Tensor | None], root: Node) -> torch.Tensor | None:
    if root in nodes:
        return nodes[root]
    left, right = (_total(nodes, half) for half in root.halves())
    if left is None or right is None:
        return left if right is None else right
    return left + right


@pytest.mark.parametrize("make", [tasks.regression, tasks.least_squares, noisy])
@pytest.mark.parametrize("cut", [[(0, 8)], [(0, 3), (3, 8)], [(0, 1), (1, 2), (2, 7), (7, 8)]])
@pytest.mark.parametrize("step", [0, 4])
def test_any_cut_gives_the_same_bits(make: Any, cut: list[tuple[int, int]], step: int) -> None:
    """Step 4 is the ragged end of the epoch: 5 samples, so most micro-batches are empty."""
    spec = _spec(data={"global_batch": 24})
    computer, slots, *_ = _computer(make, spec)
    expected_node = _train(computer, step, (0, 8)).nodes[0]
    assert expected_node.slot is not None
    expected = slots[expected_node.slot].clone()
    nodes: dict[Node, torch.Tensor | None] = {}
    for part in cut:
        fresh, fresh_slots, *_ = _computer(make, spec)
        for node in _train(fresh, step, part).nodes:
            value = None if node.slot is None else fresh_slots[node.slot].clone()
            nodes[Node(node.low, node.high)] = value
    total = _total(nodes, Node(0, 8))
    assert total is not None
    assert torch.equal(total, expected)


def test_prefetched_batches_change_nothing() -> None:
    spec = _spec(data={"global_batch": 16})
    with_prefetch, slots, *_ = _computer(noisy, spec)
    without, other, *_ = _computer(noisy, spec)
    for step in range(3):
        one, two = _train(with_prefetch, step, (0, 8)), _train(without, step, (0, 8))
        assert one.leaves == two.leaves
        assert torch.equal(slots[one.nodes[0].slot], other[two.nodes[0].slot])  # type: ignore[index]
        assert one.buffers == two.buffers
        with_prefetch.prefetch(Assign(step, Round.TRAIN, ((0, 8),)))


def test_buffers_come_from_micro_batch_0_alone() -> None:
    spec = _spec(data={"global_batch": 16})
    computer, *_ = _computer(noisy, spec)
    whole = _train(computer, 0, (0, 8)).buffers
    assert whole is not None
    assert _computer(noisy, spec)[0].answer(Assign(0, Round.TRAIN, ((3, 8),)), b"").buffers is None
    assert _computer(noisy, spec)[0].answer(Assign(0, Round.TRAIN, ((0, 1),)), b"").buffers == whole
    following = _computer(noisy, spec)[0].answer(Assign(1, Round.TRAIN, ((0, 1),), whole), b"").buffers
    assert following not in (None, whole)


@pytest.mark.parametrize(
    ("task", "cause", "micro_batch"),
    [
        (tasks.vector_loss, LossError, 0),
        (lambda: tasks.failing_dataset(5), OSError, None),
    ],
)
def test_what_user_code_raises_names_its_micro_batch(task: Any, cause: type, micro_batch: int | None) -> None:
    computer, *_ = _computer(task, _spec(data={"global_batch": 101}))
    with pytest.raises(MicroBatchError) as caught:
        _train(computer, 0, (0, 8))
    assert isinstance(caught.value.__cause__, cause)
    assert micro_batch is None or caught.value.micro_batch == micro_batch


def test_a_diagnosis_names_the_parameter() -> None:
    computer, *_ = _computer(tasks.nonfinite_gradient(), _spec(data={"global_batch": 8}))
    push = computer.answer(Assign(0, Round.DIAGNOSE, ((2, 4),)), b"")
    assert [leaf.nonfinite for leaf in push.leaves] == ["0.weight", "0.weight"]
    assert push.buffers is None
