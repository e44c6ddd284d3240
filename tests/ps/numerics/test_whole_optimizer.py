"""Optimizers of whole parameters against their own classes in plain PyTorch, for any number of shards and threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

from ps.checkpoint.named_state import assemble
from ps.numerics.threads import Threads, split
from ps.numerics.whole_optimizer import OptimizerClassError, WholeOptimizer, class_named, has_two_modes, whole_class
from ps.parameters.layout import BLOCK_NUMEL, Layout, Shard, build_layout, shards
from ps.step.best import Standing
from steepest.optimizer_spec import optimizer_spec
from steepest.spec import OptimizerSpec
from tests.support.models import described

SHAPES = [(20, 30), (30,), (48, 48), (1,), (), (6, 3, 3, 3), (20, 24)]
LIBRARY = "pytorch_optimizer"
CASES: list[dict[str, Any]] = [
    {"name": "muon"},
    {"name": "muon", "weight_decay": 0.02, "momentum": 0.9, "adamw": ("2.*",), "betas": (0.8, 0.95), "nesterov": False},
    {"name": "muon", "adjust_lr_fn": "original", "ns_steps": 3},
    {"name": "adafactor", "weight_decay": 0.01, "beta2_decay": -0.7},
    {"name": "torch.optim:NAdam", "lr": 1e-2, "options": {"betas": [0.8, 0.9]}},
    {"name": f"{LIBRARY}:SOAP", "lr": 1e-2, "options": {"precondition_frequency": 3}},
    {"name": f"{LIBRARY}:Shampoo", "lr": 1e-2, "options": {"preconditioning_compute_steps": 2}},
    {"name": f"{LIBRARY}:Lamb", "lr": 1e-2, "weight_decay": 0.1},
    {"name": f"{LIBRARY}:LARS", "lr": 1e-1},
    {"name": f"{LIBRARY}:Lion", "lr": 1e-3},
    {"name": f"{LIBRARY}:AdEMAMix", "lr": 1e-2},
    {"name": f"{LIBRARY}:ScheduleFreeAdamW", "lr": 1e-2, "weight_decay": 0.1, "options": {"warmup_steps": 5}},
    {"name": f"{LIBRARY}:ScheduleFreeSGD", "lr": 1e-1},
]


def _id(raw: dict[str, Any]) -> str:
    return raw["name"].rpartition(":")[2] + "".join(f"-{key}" for key in raw if key not in ("name", "lr", "options"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As servers have it: a matrix product has other bits with other numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _layout(spec: OptimizerSpec, dtype: torch.dtype) -> Layout:
    return build_layout(
        described(SHAPES, str(dtype).removeprefix("torch.")),
        decay_biases_and_norms=spec.decay_biases_and_norms,
        is_whole=True,
    )


def _initial(layout: Layout) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    flat = torch.zeros(layout.numel, dtype=layout.dtype)
    for view in layout.views(flat):
        view.copy_(torch.randn(view.shape, generator=generator))
    return flat


def _gradient(layout: Layout, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    flat = torch.zeros(layout.numel, dtype=layout.dtype)
    for view in layout.views(flat):
        view.copy_(torch.randn(view.shape, generator=generator))
    return flat


def _optimizer(spec: OptimizerSpec, shard: Shard, flat: torch.Tensor, num_threads: int = 1) -> WholeOptimizer:
    optimizer = WholeOptimizer(spec, shard, flat[shard.start : shard.stop])
    ranges = split(shard, num_threads)
    optimizer.use_threads(Threads(len(ranges)), ranges, num_threads)
    return optimizer


def _step(layout: Layout, cut: tuple[Shard, ...], optimizers: list[WholeOptimizer], step: int, lr: float) -> None:
    gradient = _gradient(layout, step) * 8
    for shard, optimizer in zip(cut, optimizers, strict=True):
        optimizer.step(
            gradient[shard.start : shard.stop], lr=lr * (1 - step / 200), divisor=8.0, coefficient=0.5, max_value=None
        )


def _run(
    raw: dict[str, Any], num_servers: int, dtype: torch.dtype, steps: int, num_threads: int = 1
) -> tuple[Layout, torch.Tensor, list[WholeOptimizer]]:
    spec = optimizer_spec(**raw)
    layout = _layout(spec, dtype)
    flat = _initial(layout)
    cut = shards(layout, num_servers)
    optimizers = [_optimizer(spec, shard, flat, num_threads) for shard in cut]
    for step in range(steps):
        _step(layout, cut, optimizers, step, spec.base_lr)
    return layout, flat, optimizers


def _state(layout: Layout, flat: torch.Tensor, optimizers: list[WholeOptimizer]) -> dict[str, torch.Tensor]:
    """As it is in a checkpoint."""
    parts = [part for optimizer in optimizers for part in optimizer.export_state()]
    model = described(SHAPES, str(layout.dtype).removeprefix("torch."))
    return assemble(model, layout, flat, b"", b"", parts, standing=Standing()).optimizer


@pytest.mark.parametrize("raw", CASES, ids=_id)
def test_a_hundred_steps_are_those_of_plain_pytorch(raw: dict[str, Any]) -> None:
    spec = optimizer_spec(**raw, decay_biases_and_norms=False)
    layout = _layout(spec, torch.float64)
    start = _initial(layout)
    parameters = [torch.nn.Parameter(view.clone()) for view in layout.views(start)]
    classes: dict[Any, torch.optim.Optimizer] = {}
    for placed, parameter in zip(layout.parameters, parameters, strict=True):
        found, arguments = whole_class(spec, placed.name, placed.shape)
        decay = {} if len(placed.shape) >= 2 else {"weight_decay": 0.0}
        if found in classes:
            classes[found].add_param_group({"params": [parameter], **decay})
        else:
            classes[found] = found([{"params": [parameter], **decay}], **arguments)
    modes = [reference for reference in classes.values() if has_two_modes(type(reference))]
    for reference in modes:
        reference.train()  # type: ignore[attr-defined]
    for step in range(100):
        gradients = layout.views(_gradient(layout, step) * 0.5)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for reference in classes.values():
            for group in reference.param_groups:
                group["lr"] = spec.base_lr * (1 - step / 200)
            reference.step()
    _, flat, optimizers = _run({**raw, "decay_biases_and_norms": False}, 2, torch.float64, 100)
    for view, parameter in zip(layout.views(flat), parameters, strict=True):
        assert torch.equal(view, parameter.detach())
    averaged = [optimizer.averaged() for optimizer in optimizers]
    assert all(average is not None for average in averaged) == bool(modes)
    if modes:
        trained = flat.clone()
        for reference in modes:
            reference.eval()  # type: ignore[attr-defined]
        whole = torch.cat([average for average in averaged if average is not None])
        for view, parameter in zip(layout.views(whole), parameters, strict=True):
            assert torch.equal(view, parameter.detach())
        assert torch.equal(flat, trained)
        assert not torch.equal(whole, trained)


@pytest.mark.parametrize("raw", CASES, ids=_id)
def test_bits_and_state_depend_neither_on_shards_nor_on_threads(raw: dict[str, Any]) -> None:
    layout, one, first = _run(raw, 1, torch.float32, 12)
    expected = _state(layout, one, first)
    assert expected
    for num_servers, num_threads in ((2, 1), (3, 1), (1, 3), (40, 2)):
        _, flat, optimizers = _run(raw, num_servers, torch.float32, 12, num_threads)
        assert torch.equal(flat, one)
        found = _state(layout, flat, optimizers)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("raw", CASES, ids=_id)
def test_training_goes_on_from_a_state_with_another_number_of_shards(raw: dict[str, Any]) -> None:
    spec = optimizer_spec(**raw)
    layout, flat, optimizers = _run(raw, 2, torch.float32, 7)
    state = {key: tensor.clone() for key, tensor in _state(layout, flat, optimizers).items()}
    resumed = flat.clone()
    cut = shards(layout, 3)
    again = [_optimizer(spec, shard, resumed) for shard in cut]
    for optimizer in again:
        optimizer.import_state(state)
    for optimizer in again:
        optimizer.averaged()  # as for an evaluation
    for step in range(7, 12):
        _step(layout, cut, again, step, spec.base_lr)
    _, straight, _ = _run(raw, 1, torch.float32, 12)
    assert torch.equal(resumed, straight)


def test_a_whole_layout_is_cut_between_parameters_and_segments_stay() -> None:
    model = described([(BLOCK_NUMEL + 5,), (7,), (3 * BLOCK_NUMEL,), (0,), (100,)])
    layout = build_layout(model, is_whole=True)
    starts = {p.offset for p in layout.parameters} | {layout.numel}
    (whole,) = shards(layout, 1)
    for num_servers in range(1, 9):
        cut = shards(layout, num_servers)
        assert cut[0].start == 0
        assert cut[0].numel
        assert all(s.start in starts for s in cut)
        assert sum(s.numel for s in cut) == layout.numel
        segments = [(a + s.start, b + s.start) for s in cut for a, b in s.segments]
        assert segments == list(whole.segments)
        for shard in cut:
            for num_threads in (1, 2, 3):
                edges = {low + shard.start for low, _ in split(shard, num_threads)} - {shard.start}
                assert all(edge % BLOCK_NUMEL == 0 for edge in edges)


@pytest.mark.parametrize(
    ("name", "field", "said"),
    [
        ("no_such_module:Adam", "optimizer.name", "there is no module 'no_such_module'"),
        ("torch.optim:NoSuch", "optimizer.name", "is not there"),
        ("torch.nn:Linear", "optimizer.name", "is no subclass of torch.optim.Optimizer"),
    ],
)
def test_what_is_no_optimizer_is_refused(name: str, field: str, said: str) -> None:
    with pytest.raises(OptimizerClassError, match=said) as caught:
        class_named(name)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("raw", "field", "said"),
    [
        ({"options": {"beta": 1}}, "optimizer.options.beta", "takes no argument 'beta'; it takes: lr, momentum"),
        ({"name": "torch.optim:Rprop", "weight_decay": 0.1}, "optimizer.weight_decay", "takes no argument"),
    ],
)
def test_arguments_that_a_class_does_not_take_are_refused(raw: dict[str, Any], field: str, said: str) -> None:
    spec = optimizer_spec(**{"name": "torch.optim:SGD", "lr": 0.1, **raw})
    with pytest.raises(OptimizerClassError, match=said) as caught:
        whole_class(spec, "w", (3,))
    assert caught.value.field == field


class WritesParameters(torch.optim.SGD):
    """Its eval() notes where it writes."""

    written: ClassVar[set[int]] = set()

    def train(self) -> None:
        """Nothing to undo: what was written to is let go of."""

    @torch.no_grad()
    def eval(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.zero_()
                self.written.add(parameter.data_ptr())


def test_parameters_that_may_be_on_their_way_to_workers_are_not_written_to_for_an_average() -> None:
    raw = {"name": f"{__name__}:WritesParameters", "lr": 0.1, "options": {"momentum": 0.9}}
    layout, flat, (optimizer,) = _run(raw, 1, torch.float32, 0)
    before = flat.clone()
    average = optimizer.averaged()
    assert average is not None
    assert torch.equal(average, before)  # without a step there is none
    _step(layout, shards(layout, 1), [optimizer], 0, 0.1)
    stepped = flat.clone()
    average = optimizer.averaged()
    assert average is not None
    assert not any(view.any() for view in layout.views(average))
    assert torch.equal(flat, stepped)
    begin, end = flat.data_ptr(), flat.data_ptr() + flat.nbytes
    assert WritesParameters.written
    assert not any(begin <= place < end for place in WritesParameters.written)
    _step(layout, shards(layout, 1), [optimizer], 1, 0.1)
    assert not torch.equal(flat, stepped)
