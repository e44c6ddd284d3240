"""Refuses ways to a gradient that do not go with a task."""

from __future__ import annotations

import torch

from ps.job.config import layout_of
from ps.parameters.description import ModelDescription
from steepest.full_batch_spec import DIFFERENCES, NewtonCgSpec
from steepest.spec import ESTIMATE, FINITE, REVERSE, TrainingJobSpec
from steepest.task import AnalyticTask, Task
from worker.task.load import TaskError

MOST_NUMEL = 2000  # entries of parameters, each of which takes a pass or two


def check_derivative(spec: TrainingJobSpec, task: Task | AnalyticTask, model: ModelDescription) -> None:
    """Raises TaskError."""
    way, optimizer = spec.derivative, spec.optimizer
    if way == REVERSE:
        return
    layout = layout_of(model, spec)
    numel = sum(p.numel for p in layout.parameters)
    multiplies = isinstance(optimizer, NewtonCgSpec) and optimizer.products != DIFFERENCES
    problems = {
        "an AnalyticTask has a gradient of its own: leave it out": isinstance(task, AnalyticTask),
        f"every one of {numel:,} entries would take a pass of each micro-batch, and at most {MOST_NUMEL:,} may: take "
        f"reverse, or {ESTIMATE}": way != ESTIMATE and numel > MOST_NUMEL,
        "differences are too coarse in float32: use float64 (model.double())": way == FINITE
        and layout.dtype != torch.float64,
        "it is for real parameters, and some are complex: take reverse": any(p.is_complex for p in model.parameters),
        "memory.checkpoint_activations is for backward passes, and none is made: leave one of the two out": bool(
            spec.memory.checkpoint_activations or spec.memory.activation_budget
        ),
        "compile is for backward passes, and none is made: leave one of the two out": spec.compile,
        "newton_cg multiplies by backward passes: take reverse, or optimizer.products=differences": multiplies,
        f"{optimizer.name} trusts gradients, and an estimate is none: take reverse or forward": way == ESTIMATE
        and optimizer.is_full_batch,
    }
    for problem, holds in problems.items():
        if holds:
            raise TaskError("derivative", f"{way}: {problem}")
