"""Refuses ways to a gradient that do not go with a task."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from ps.job.config import layout_of
from ps.parameters.description import ModelDescription
from steepest.full_batch_spec import multiplies
from steepest.spec import ESTIMATE, FINITE, FORWARD, REVERSE, TrainingJobSpec
from steepest.task import AnalyticTask, Task
from worker.gradients.backend import CpuBackend
from worker.gradients.engine import Rehearsed
from worker.gradients.slopes import SlopeEngine
from worker.gradients.torch_engine import TorchEngine
from worker.rehearsal.passes import Passes
from worker.task.load import TaskError

TOLERANCES = {FORWARD: 1e-3, ESTIMATE: 1e-3, FINITE: 1e-4}  # of rounding, in float32 but for differences
MOST_NUMEL = 2000  # entries of parameters, each of which takes a pass or two


def check_derivative(spec: TrainingJobSpec, task: Task | AnalyticTask, model: ModelDescription) -> None:
    """Raises TaskError."""
    way, optimizer = spec.derivative, spec.optimizer
    if way == REVERSE:
        return
    layout = layout_of(model, spec)
    numel = sum(p.numel for p in layout.parameters)
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
        "newton_cg multiplies by backward passes: take reverse, or optimizer.products=differences": multiplies(
            optimizer
        ),
        f"{optimizer.name} trusts gradients, and an estimate is none: take reverse or forward": way == ESTIMATE
        and optimizer.is_full_batch,
    }
    for problem, holds in problems.items():
        if holds:
            raise TaskError("derivative", f"{way}: {problem}")


def compare_way(passes: Passes, indices: NDArray[np.int64]) -> None:
    """Compare a micro-batch's gradient in the job's way with that of backpropagation. Raises TaskError.

    They differ where code stops gradients that only backpropagation knows of: by no_grad, or through a parameter that
    it holds itself.
    """
    way, task, reverse = passes.spec.derivative, passes.task, passes.engine
    if way == REVERSE or not isinstance(task, Task) or not isinstance(reverse, TorchEngine):
        return
    expected, found = passes.gradient("part"), passes.gradient("total")
    passes.compute(indices, expected)
    known = Rehearsed(reverse.evaluates_with_gradients)
    own = SlopeEngine(way, task, passes.model, passes.layout, CpuBackend(), passes.spec.precision, known)
    own.bind(passes.flat)
    passes.engine = own
    try:
        passes.compute(indices, found)
        passes.seed()
        along = torch.zeros_like(expected)
        for place, direction in zip(passes.layout.views(along), own.directions(), strict=True):
            place.copy_(direction)
    except TaskError as error:
        raise TaskError("derivative", f"{way}: {error.message}", error.traceback) from error
    finally:
        passes.engine = reverse
    if way == ESTIMATE:
        expected = along * float(expected.double().dot(along.double()))
    off, size = (float(torch.linalg.vector_norm(v.double())) for v in (found - expected, expected))
    if not math.isfinite(off + size) or off <= TOLERANCES[way] * size + 1e-12:
        return
    raise TaskError(
        "derivative",
        f"{way} gives a gradient that is {off / max(size, 1e-30):.1%} off from backpropagation's: code that stops "
        "gradients (torch.no_grad, detach), or that holds parameters outside the model's own names, is another "
        "function to it; take reverse",
    )
