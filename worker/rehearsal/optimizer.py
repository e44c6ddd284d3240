"""Rehearses an optimizer that needs whole parameters, on small ones, so that what cannot work is said at submission."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ps.numerics.optimizer import leave_out_dynamo
from ps.numerics.whole_optimizer import (
    OptimizerClassError,
    averages_itself,
    class_named,
    evaluated_with,
    has_two_modes,
    make_group,
    whole_class,
)
from ps.parameters.description import ModelDescription
from ps.parameters.layout import GroupRange, Layout, grouped
from steepest.full_batch_spec import DIFFERENCES, NewtonCgSpec
from steepest.optimizer_base import OptimizerSpec
from steepest.optimizer_spec import ClassSpec
from steepest.optimizer_state import StateKindError, counted, pack_state, unpack_state
from steepest.spec import ClipSpec, TrainingJobSpec
from worker.rehearsal.passes import blamed
from worker.task.load import TaskError

LARGEST = 32  # in every dimension of the parameters that it is tried on
STEPS = 5
NOISE = 0.3
CLOSE = 1e-4  # relative; an optimizer may take another way for many tensors, to the same values but for rounding


@dataclass(frozen=True)
class _Sample:
    """A kind of parameter that the model has, made small."""

    name: str
    shape: tuple[int, ...]
    group: GroupRange


def check_optimizer(spec: TrainingJobSpec, model: ModelDescription, layout: Layout, num_samples: int) -> None:
    """Take some steps with the job's optimizer, and refuse one that would give another result than plain PyTorch.

    Raises TaskError.
    """
    if spec.optimizer.is_full_batch:
        _check_full_batch(spec, layout, num_samples)
        return
    optimizer = spec.optimizer
    if not optimizer.is_whole:
        return
    pairs = [p.name for p in model.parameters if p.is_complex]
    if pairs:
        problem = f"{optimizer.name} looks at whole parameters, and {pairs[0]} is complex"
        raise TaskError("optimizer.name", f"{problem}: take adamw or another that works element by element")
    leave_out_dynamo()
    if isinstance(optimizer, ClassSpec):
        with _told("optimizer.name", f"importing {optimizer.name}"):
            _check_kind(optimizer)
            if spec.average.is_on and averages_itself(optimizer):
                raise OptimizerClassError(
                    "average.name",
                    f"{optimizer.name} averages parameters itself, with its eval(), and an evaluation is of one "
                    "average: leave average out",
                )
    with _told("optimizer", optimizer.name):
        samples = list(_samples(optimizer, layout))
        alone = [_Run(optimizer, [sample], spec.seed, layout.dtype) for sample in samples]
    with blamed("optimizer", f"a step of {optimizer.name}"):
        for run in alone:
            run.steps(range(STEPS))
    _check_repeats(optimizer, alone, spec, layout)
    _check_modes(optimizer, alone, spec, layout)
    _check_state(optimizer, alone, spec, layout)
    _check_independence(optimizer, samples, spec)


def _check_full_batch(spec: TrainingJobSpec, layout: Layout, num_samples: int) -> None:
    """Raises TaskError for what does not go with one function of the parameters that is to be minimized."""
    name = spec.optimizer.name
    is_newton = isinstance(spec.optimizer, NewtonCgSpec)
    problems = {
        "data.global_batch": spec.data.global_batch < num_samples
        and f"{name} needs all {num_samples} samples in every step, and has {spec.data.global_batch}: set it to that",
        "clip": spec.clip != ClipSpec() and f"a clipped gradient is not the loss's, and {name} trusts it: leave it out",
        "optimizer.weight_decay": bool(spec.optimizer.weight_decay) and f"{name} takes none: add it to the loss",
        "optimizer.lr": is_newton and spec.optimizer.lr is not None and f"{name} finds its steps itself: leave it out",
        "task.model": isinstance(spec.optimizer, NewtonCgSpec)
        and spec.optimizer.products == DIFFERENCES
        and layout.dtype != torch.float64
        and f"{name} takes differences of gradients, for which float32 is too coarse: use float64 (model.double())",
        "on_nonfinite": spec.on_nonfinite != "fail" and f"{name} cannot skip a step; allowed: fail",
        "best.patience": is_newton
        and spec.best.patience is not None
        and f"most steps of {name} stay at one point, whose evaluations are no better: leave it out",
        "average.name": (
            is_newton
            and spec.average.is_on
            and f"most steps of {name} stay at one point, which would count again and again: allowed: none"
        )
        or (spec.average.is_lookahead and f"{name} finds its own way: allowed: none, ema, swa"),
        "placement.servers": spec.placement.num_servers > 1 and f"{name} needs all parameters in one place; allowed: 1",
        "task.parameter_groups": any((g.lr_scale, g.weight_decay) != (1.0, None) for g in layout.groups)
        and f"{name} updates all parameters alike: groups may only freeze some",
    }
    for field, problem in problems.items():
        if problem:
            raise TaskError(field, problem)


@contextmanager
def _told(field: str, what: str) -> Iterator[None]:
    """As `blamed`, for what may raise OptimizerClassError too."""
    with blamed(field, what):
        try:
            yield
        except OptimizerClassError as error:
            raise TaskError(error.field, error.message) from None


def _check_kind(optimizer: ClassSpec) -> None:
    """Raises OptimizerClassError for a class that needs more than gradients."""
    found = class_named(optimizer.name)
    _, *arguments = inspect.signature(found.step).parameters.values()
    optional = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [a.name for a in arguments if a.default is a.empty and a.kind not in optional]
    if needed:
        raise OptimizerClassError(
            "optimizer.name",
            f"a step of {optimizer.name} needs {', '.join(needed)}, to compute losses and gradients of its own; here "
            "workers compute one gradient a step: take an optimizer whose step needs no argument",
        )


def _samples(optimizer: OptimizerSpec, layout: Layout) -> Iterable[_Sample]:
    """One parameter of each kind, the first of the model's, small. Raises OptimizerClassError."""
    seen = set()
    for placed, group in grouped(layout, layout.groups):
        shape = tuple(min(size, LARGEST) for size in placed.shape)
        key = whole_class(optimizer, placed.name, placed.shape)[0], shape, group
        if key not in seen:
            seen.add(key)
            yield _Sample(placed.name, shape, group)


class _Run:
    """Parameters of some samples with one optimizer for each class, as a script would have it."""

    def __init__(self, spec: OptimizerSpec, samples: Sequence[_Sample], seed: int, dtype: torch.dtype) -> None:
        self.samples = samples
        self._seed = seed
        self.tensors = [nn.Parameter(self._drawn(index, -1, dtype)) for index in range(len(samples))]
        chosen = [whole_class(spec, sample.name, sample.shape) for sample in samples]
        self.optimizers: list[torch.optim.Optimizer] = []
        for found, arguments in dict(chosen).items():
            own: dict[GroupRange, list[nn.Parameter]] = {}
            for sample, tensor, (kind, _) in zip(samples, self.tensors, chosen, strict=True):
                if kind is found:
                    own.setdefault(sample.group, []).append(tensor)
            made = found([make_group(found, t, group) for group, t in own.items()], **arguments)
            if has_two_modes(found):
                made.train()  # type: ignore[attr-defined]
            self.optimizers.append(made)
        self.starts = [dict(group) for optimizer in self.optimizers for group in optimizer.param_groups]

    def _drawn(self, index: int, step: int, dtype: torch.dtype) -> torch.Tensor:
        sample = self.samples[index]
        key = sum(map(ord, sample.name)) + sum(sample.shape) + 7919 * (step + 1) + self._seed
        generator = torch.Generator().manual_seed(key)
        return torch.randn(sample.shape, generator=generator, dtype=torch.float64).to(dtype)

    def _gradient(self, index: int, step: int, dtype: torch.dtype) -> torch.Tensor:
        """Much the same direction in every step, as in training, so that what follows the distance moved shows."""
        return self._drawn(index, 0, dtype) + NOISE * self._drawn(index, step + 1, dtype)

    def steps(self, numbers: Iterable[int]) -> None:
        """Take these steps, each with a gradient of its own."""
        for step in numbers:
            for index, tensor in enumerate(self.tensors):
                tensor.grad = self._gradient(index, step, tensor.dtype)
            for optimizer in self.optimizers:
                optimizer.step()


def _check_repeats(optimizer: OptimizerSpec, alone: Sequence[_Run], spec: TrainingJobSpec, layout: Layout) -> None:
    """The same steps give the same values, whatever the random generators say."""
    for run in alone:
        again = _Run(optimizer, run.samples, spec.seed, layout.dtype)
        again.steps(range(STEPS))
        if not torch.equal(run.tensors[0], again.tensors[0]):
            raise TaskError(
                "optimizer.name",
                f"{optimizer.name} gave two results for the same gradients, so it draws random numbers, and a job "
                "would not be repeatable: take an optimizer, or options, without",
            )


def _check_modes(optimizer: OptimizerSpec, alone: Sequence[_Run], spec: TrainingJobSpec, layout: Layout) -> None:
    """Training goes on after an evaluation as if there had been none."""
    for run in alone:
        if not has_two_modes(type(run.optimizers[0])):
            continue
        disturbed, undisturbed = (_Run(optimizer, run.samples, spec.seed, layout.dtype) for _ in range(2))
        (parameter,) = disturbed.tensors
        with blamed("optimizer", f"train() or eval() of {optimizer.name}"):
            disturbed.steps(range(STEPS))
            evaluated_with(disturbed.optimizers[0], parameter)
            disturbed.steps([STEPS])
        undisturbed.steps(range(STEPS + 1))
        if not torch.equal(parameter, undisturbed.tensors[0]):
            raise TaskError(
                "optimizer.name",
                f"{optimizer.name} goes on in another way after eval() and train(), so these change more than the "
                "values of its parameters: have eval() write to the parameters in place, and train() undo that",
            )


def _check_independence(optimizer: OptimizerSpec, samples: Sequence[_Sample], spec: TrainingJobSpec) -> None:
    """A parameter's update depends on no other parameter. In float64, where small updates show."""

    def moved(run: _Run) -> list[torch.Tensor]:
        before = [tensor.detach().clone() for tensor in run.tensors]
        with blamed("optimizer", f"a step of {optimizer.name}"):
            run.steps(range(STEPS))
        return [tensor.detach() - start for tensor, start in zip(run.tensors, before, strict=True)]

    together = moved(_Run(optimizer, samples, spec.seed, torch.float64))
    for sample, update in zip(samples, together, strict=True):
        run, other = (_Run(optimizer, [sample], seed, torch.float64) for seed in (spec.seed, spec.seed + 1))
        [own], _ = moved(run), moved(other)
        # What a group learns from gradients, all of its parameters share.
        learned = [pack_state({}, counted(r.starts[0], r.optimizers[0].param_groups[0])) for r in (run, other)]
        apart = learned[0].keys() != learned[1].keys() or any(
            not torch.equal(value, learned[1][name]) for name, value in learned[0].items()
        )
        if apart or not torch.allclose(own, update, rtol=CLOSE, atol=CLOSE * float(own.abs().max())):
            raise TaskError(
                "optimizer.name",
                f"{optimizer.name} updates the parameter {sample.name!r} in another way when it has other parameters "
                "beside it, and servers have some parameters each: take an optimizer that treats every parameter by "
                "itself",
            )


def _check_state(optimizer: OptimizerSpec, alone: Sequence[_Run], spec: TrainingJobSpec, layout: Layout) -> None:
    """Training goes on from a checkpoint as if nothing had been."""
    for run in alone:
        try:
            group = counted(run.starts[0], run.optimizers[0].param_groups[0])
            packed = pack_state(run.optimizers[0].state.get(run.tensors[0], {}), group)
        except StateKindError as error:
            problem = f"the state of {optimizer.name} cannot be kept in a checkpoint: {error}"
            raise TaskError("optimizer.name", problem) from error
        resumed = _Run(optimizer, run.samples, spec.seed, layout.dtype)
        with torch.no_grad():
            resumed.tensors[0].copy_(run.tensors[0])
        state, group = unpack_state({name: tensor.clone() for name, tensor in packed.items()})
        if state:
            resumed.optimizers[0].state[resumed.tensors[0]] = state
        resumed.optimizers[0].param_groups[0].update(group)
        for each in (run, resumed):
            with blamed("optimizer", f"a step of {optimizer.name}"):
                each.steps([STEPS])
        if not torch.equal(run.tensors[0], resumed.tensors[0]):
            raise TaskError(
                "optimizer.name",
                f"{optimizer.name} goes on in another way from a checkpoint, so it keeps something outside of its "
                "state and parameter group: keep it in self.state[parameter] or in the group",
            )
