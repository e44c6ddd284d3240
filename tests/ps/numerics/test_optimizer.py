"""Every optimizer against torch.optim on tensors of the parameters' own shapes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from ps.numerics.optimizer import ShardOptimizer, torch_class, torch_options
from ps.numerics.threads import Threads, split
from ps.parameters.layout import BLOCK_NUMEL, Shard, build_layout, shards
from steepest.optimizer_spec import optimizer_spec
from steepest.spec import ELEMENTWISE, OptimizerSpec
from tests.support.models import described

SHAPES = [(40, 50), (50,), (300, 300), (1,), ()]
EXTRAS: dict[str, list[dict[str, Any]]] = {
    "sgd": [{}, {"weight_decay": 0.01}, {"momentum": 0.5, "dampening": 0.1}],
    "momentum": [{}, {"momentum": 0.8}],
    "nesterov": [{}, {"weight_decay": 0.01}],
    "adagrad": [{}, {"lr_decay": 0.01, "initial_accumulator_value": 0.1, "eps": 1e-8}],
    "rmsprop": [{}, {"momentum": 0.9, "centered": True}, {"alpha": 0.9}],
    "adam": [{}, {"betas": (0.8, 0.95), "amsgrad": True}],
    "adamw": [{}, {"weight_decay": 0.1}],
    "adadelta": [{}, {"rho": 0.8, "weight_decay": 0.01}],
    "adamax": [{}, {"betas": (0.8, 0.95), "weight_decay": 0.01}],
    "nadam": [{}, {"momentum_decay": 0.01, "decoupled_weight_decay": True, "weight_decay": 0.1}],
    "radam": [{}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "rprop": [{}, {"etas": (0.4, 1.3), "step_sizes": (1e-5, 1.0)}],
    "asgd": [{}, {"lambd": 0.01, "alpha": 0.5, "t0": 5.0, "weight_decay": 0.01}],
}
CASES = [(name, extra) for name in ELEMENTWISE for extra in EXTRAS[name]]


def _reference(spec: OptimizerSpec, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if spec.decay_biases_and_norms or p.dim() >= 2]}]
    if not spec.decay_biases_and_norms:
        groups.append({"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0})
    return torch_class(spec)(groups, **torch_options(spec))


def _shard_optimizer(spec: OptimizerSpec, shard: Shard, flat: torch.Tensor, num_threads: int = 1) -> ShardOptimizer:
    optimizer = ShardOptimizer(spec, shard, flat)
    ranges = split(shard, num_threads)
    optimizer.use_threads(Threads(len(ranges)), ranges, num_threads)
    return optimizer


def _run(spec: OptimizerSpec, num_servers: int, dtype: torch.dtype, steps: int = 20) -> tuple[Any, ...]:
    layout = build_layout(
        described(SHAPES, str(dtype).removeprefix("torch.")), decay_biases_and_norms=spec.decay_biases_and_norms
    )
    generator = torch.Generator().manual_seed(0)
    flat = torch.zeros(layout.numel, dtype=dtype)
    parameters = []
    for view in layout.views(flat):
        view.copy_(torch.randn(view.shape, generator=generator))
        parameters.append(torch.nn.Parameter(view.clone()))
    reference = _reference(spec, parameters)
    cut = shards(layout, num_servers)
    optimizers = [_shard_optimizer(spec, s, flat[s.start : s.stop]) for s in cut]
    for step in range(steps):
        lr = spec.base_lr * (1 - step / 40)
        gradient = torch.zeros(layout.numel, dtype=dtype)
        for view, parameter in zip(layout.views(gradient), parameters, strict=True):
            view.copy_(torch.randn(view.shape, generator=generator) * 8)
            parameter.grad = view / 8 * 0.5
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        for s, optimizer in zip(cut, optimizers, strict=True):
            part = gradient[s.start : s.stop]
            optimizer.step(part, lr=lr, divisor=8.0, coefficient=0.5, max_value=None)
    return layout, flat, parameters, reference, cut, optimizers


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("name", "extra"), CASES)
def test_it_is_torch_optim(name: str, extra: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    spec = optimizer_spec(name=name, decay_biases_and_norms=False, **extra)  # type: ignore[arg-type]
    layout, flat, parameters, *_ = _run(spec, 2, dtype)
    for view, parameter in zip(layout.views(flat), parameters, strict=True):
        largest = parameter.detach().abs().max().clamp(min=1.0)
        assert float((view - parameter.detach()).abs().max() / largest) <= tolerance


@pytest.mark.parametrize(("name", "extra"), CASES)
def test_bits_and_state_do_not_depend_on_the_number_of_shards(name: str, extra: dict[str, Any]) -> None:
    spec = optimizer_spec(name=name, **extra)  # type: ignore[arg-type]
    _, one, *_, first = _run(spec, 1, torch.float32)
    _, three, *_, others = _run(spec, 3, torch.float32)
    assert torch.equal(one, three)

    def state(optimizers: list[ShardOptimizer]) -> dict[Any, bytes]:
        pieces: dict[Any, list[tuple[int, bytes]]] = {}
        for part in (p for o in optimizers for p in o.export_state()):
            pieces.setdefault((part.parameter, part.state), []).append((part.offset, part.values.numpy().tobytes()))
        return {key: b"".join(data for _, data in sorted(found)) for key, found in pieces.items()}

    assert state(first) == state(others)


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("decay_biases_and_norms", [True, False])
def test_bits_do_not_depend_on_the_number_of_threads(
    name: str, decay_biases_and_norms: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ps.numerics.threads.MIN_NUMEL", BLOCK_NUMEL)
    layout = build_layout(described([(1_000, 900), (900,), (400_000,)]), decay_biases_and_norms=decay_biases_and_norms)
    (shard,) = shards(layout, 1)
    spec = optimizer_spec(name=name, decay_biases_and_norms=decay_biases_and_norms)  # type: ignore[arg-type]
    flats = []
    for num_threads in (1, 2, 4):
        generator = torch.Generator().manual_seed(0)
        flat = torch.randn(layout.numel, generator=generator)
        optimizer = _shard_optimizer(spec, shard, flat, num_threads)
        for _ in range(4):
            gradient = torch.randn(layout.numel, generator=generator)
            optimizer.step(gradient, lr=0.01, divisor=3.0, coefficient=0.5, max_value=None)
        flats.append(flat)
    assert len(split(shard, 4)) == 4
    assert torch.equal(flats[0], flats[1])
    assert torch.equal(flats[0], flats[2])


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_exported_state_is_that_of_torch_optim_under_its_names(name: str) -> None:
    spec = optimizer_spec(name=name)  # type: ignore[arg-type]
    layout, _, parameters, reference, _, optimizers = _run(spec, 2, torch.float64)
    index = {p.name: i for i, p in enumerate(layout.parameters)}
    seen = set()
    for part in (p for o in optimizers for p in o.export_state()):
        expected = reference.state[parameters[index[part.parameter]]][part.state].reshape(-1)
        piece = expected[part.offset : part.offset + part.values.numel()]
        assert torch.allclose(part.values.double(), piece.double(), rtol=1e-12, atol=1e-300)
        seen.add(part.state)
    tensors = {n for s in reference.state.values() for n, v in s.items() if isinstance(v, torch.Tensor)}
    assert seen == tensors


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_going_on_from_exported_state_gives_the_same_bits(name: str) -> None:
    spec = optimizer_spec(name=name)  # type: ignore[arg-type]
    layout, flat, *_, optimizers = _run(spec, 2, torch.float32)
    shapes = {p.name: p.shape for p in layout.parameters}
    state: dict[str, torch.Tensor] = {}
    for part in (p for o in optimizers for p in o.export_state()):
        key = f"{part.parameter}.{part.state}"
        if part.state in ("step", "mu_product", "eta", "mu"):
            state[key] = part.values.reshape(()).clone()
            continue
        state.setdefault(key, torch.zeros(shapes[part.parameter]))
        state[key].view(-1)[part.offset : part.offset + part.values.numel()] = part.values
    copy = flat.clone()
    (whole,) = shards(layout, 1)
    restored = _shard_optimizer(spec, whole, copy)
    restored.import_state(state)
    gradient = torch.randn(layout.numel, generator=torch.Generator().manual_seed(9))
    for s, optimizer in zip(shards(layout, 2), optimizers, strict=True):
        part = gradient[s.start : s.stop].clone()
        optimizer.step(part, lr=0.01, divisor=3.0, coefficient=1.0, max_value=None)
    restored.step(gradient.clone(), lr=0.01, divisor=3.0, coefficient=1.0, max_value=None)
    assert all(map(torch.equal, layout.views(copy), layout.views(flat)))


def test_a_clip_by_value_bounds_every_element_and_reports_the_norm() -> None:
    layout = build_layout(described([(4,)], "float64"))
    flat = torch.zeros(layout.numel, dtype=torch.float64)
    (shard,) = shards(layout, 1)
    optimizer = _shard_optimizer(optimizer_spec(name="sgd", lr=1.0), shard, flat)
    gradient = torch.zeros(layout.numel, dtype=torch.float64)
    gradient[:4] = torch.tensor([10.0, -10.0, 1.0, 0.0])
    clamped = optimizer.step(gradient, lr=1.0, divisor=2.0, coefficient=1.0, max_value=3.0)
    assert flat[:4].tolist() == [-3.0, 3.0, -0.5, 0.0]
    assert clamped == pytest.approx(9 + 9 + 0.25, rel=1e-12)


def test_no_optimizer_imports_dynamo() -> None:
    """It takes seconds, and every server would wait for it."""
    script = """
import sys
import torch
from ps.numerics.optimizer import ShardOptimizer
from ps.parameters.layout import build_layout, shards
from steepest.optimizer_spec import ELEMENTWISE, optimizer_spec
from tests.support.models import described

[shard] = shards(build_layout(described([(40, 50)], "float32"), decay_biases_and_norms=True), 1)
for name in ELEMENTWISE:
    optimizer = ShardOptimizer(optimizer_spec(name=name, lr=0.1), shard, torch.zeros(shard.numel))
    optimizer.step(torch.ones(shard.numel), lr=0.1, divisor=1.0, coefficient=1.0, max_value=None)
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("False\n", "")
