"""Goes through what a job will do, on one micro-batch, and refuses what would fail or differ between placements."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ps.numerics.whole_optimizer import evaluates_average
from ps.parameters.description import ModelDescription
from steepest.full_batch_spec import multiplies
from steepest.spec import TrainingJobSpec
from steepest.task import AnalyticTask, Task
from worker.data.sources import source_of
from worker.gradients.compiled import compile_model
from worker.gradients.losses import IGNORED
from worker.gradients.recompute import RecomputeError, checkpoint_activations
from worker.gradients.seeding import EVALUATE
from worker.gradients.torch_engine import TorchEngine
from worker.rehearsal.comparison import (
    check_linear,
    choose_counts,
    compare_parts,
    depends_on_the_cut,
    tolerance_of,
)
from worker.rehearsal.conduct import trainable, watch_first_pass
from worker.rehearsal.derivative import compare_way
from worker.rehearsal.hidden_state import differences
from worker.rehearsal.memory import BUDGET, UNKNOWN, peak_bytes, plan, too_much
from worker.rehearsal.passes import Passes, blamed
from worker.rehearsal.words import name_of, same, shape_of, some
from worker.task.load import TaskError

FEW_SAMPLES = 2
SLOW_SECONDS = 2.0  # a micro-batch that takes longer is rehearsed with a few samples
GROWTH, QUICK_SECONDS = 4, 0.25  # how often more samples are tried, as long as their pass would not take longer
COPIES = 6  # of the parameters, that a rehearsal holds at most
EXPENSIVE = 1.5
NOTICEABLE_SECONDS = 0.003

_TOO_LARGE = (
    "the model is too large to be rehearsed in the memory that is free where the service runs; what is wrong with it "
    "shows when the job runs"
)


_STATISTICS = (
    "evaluations are of an average of the parameters, with statistics ({}) of the parameters that are trained, as in "
    "torch's AveragedModel without update_bn: to evaluate the parameters that are trained, set average.evaluate = false"
)
_MASTERS = (
    "the model's {} parameters are rounded from float32 masters, which the optimizer updates and checkpoints hold; "
    "plain PyTorch would round after every update, and lose small ones"
)


@dataclass
class Rehearsal:
    """What was found out, some of it in words.

    warnings: (code, message). price: see Compared. counts: see losses.loss_of. recomputed: what a plan for the memory
    computes again. peak_bytes: of a micro-batch's pass.
    """

    evaluates_with_gradients: bool = False
    caches: list[str] = field(default_factory=list)
    logged: tuple[str, ...] = ()
    warnings: list[tuple[str, str]] = field(default_factory=list)
    batch: str = ""
    weight: str = ""
    model: str = ""
    loss: str = ""
    price: float = 0.0
    counts: str = ""
    recomputed: str = ""
    peak_bytes: int = 0


def rehearse(
    task: Task | AnalyticTask,
    spec: TrainingJobSpec,
    model: ModelDescription,
    num_samples: int,
    num_evaluation_samples: int,
    code: Path | None,
) -> Rehearsal:
    """Rehearse a job. num_samples, num_evaluation_samples: sizes of the data. code: where the user's modules lie.

    The task is not to be used after that. Raises TaskError for what would fail later, or differ between placements, and
    OtherConductError.
    """
    found = _described(task)
    numel = sum(p.numel for p in model.parameters)
    if COPIES * numel * 4 > _free_memory():
        found.warnings.append(("not_rehearsed", _TOO_LARGE))
        return found
    passes = Passes(task, spec, model, num_samples, code)
    fresh = passes.hidden()
    whole = passes.sampler.indices(0, 0)
    _check_data(passes, whole[:FEW_SAMPLES])
    indices = watch_first_pass(passes, whole[:FEW_SAMPLES], whole)
    measured = passes.timed(indices)
    while len(indices) < len(whole):  # a pass of few samples may take as long as one of many
        if passes.seconds * len(whole) / len(indices) <= SLOW_SECONDS:
            indices = whole
        elif passes.seconds * GROWTH <= QUICK_SECONDS:
            indices = whole[: GROWTH * len(indices)]
        else:
            break
        measured = passes.timed(indices)
    found.batch = shape_of(passes.fetched)
    found.counts = choose_counts(passes)
    if found.counts:
        measured = passes.compute(indices)
    counted = f", the labels that are not {IGNORED}" if found.counts else ""
    found.weight = f"{measured.weight:g} for {len(indices)} samples{counted}"
    _check_repeats(passes, indices)
    _check_last_step(passes)
    compared = compare_parts(passes)
    found.price = compared.price
    found.warnings += compared.warnings
    found.logged = passes.logged
    found.evaluates_with_gradients = _check_evaluation(passes, num_evaluation_samples)
    found.warnings += _advice(passes, found.price)
    if num_evaluation_samples:
        found.warnings += _advice_on_average(task, spec)
    # What passes left behind is a cache, or `_check_repeats` had refused it.
    found.caches = [name for name in differences(fresh, passes.hidden()) if ": " not in name]
    _check_second_derivatives(passes, indices)
    samples, budget = len(whole), spec.memory.activation_budget
    if budget and not spec.memory.checkpoint_activations:
        found.recomputed = plan(passes, indices, samples)
    how = found.recomputed or spec.memory.checkpoint_activations
    _check_recomputing(passes, indices, how)
    _check_second_derivatives(passes, indices)
    found.peak_bytes = peak_bytes(passes, indices, samples)
    if budget and not found.peak_bytes:
        raise TaskError(BUDGET, UNKNOWN)
    if budget and found.peak_bytes > budget:
        raise TaskError(BUDGET, too_much(found.peak_bytes, budget, samples, [how]))
    _check_what_it_asks_for(passes, indices)
    return found


def _check_what_it_asks_for(passes: Passes, indices: NDArray[np.int64]) -> None:
    """Raises TaskError when something of the spec does not go with the task."""
    check_linear(passes, indices)
    _check_compiling(passes, indices)
    _check_second_derivatives(passes, indices)
    compare_way(passes, indices)
    if passes.spec.optimizer.is_full_batch:
        _check_one_function(passes, indices)


def _free_memory() -> int:
    """Bytes."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _described(task: Task | AnalyticTask) -> Rehearsal:
    if isinstance(task, AnalyticTask):
        return Rehearsal(model="AnalyticTask", loss=f"gradient: {name_of(task.gradient)}")
    loss = "the model's own"
    for name, function in (("loss", task.loss), ("batch_loss", task.batch_loss)):
        if function is not None:
            loss = f"{name}: {name_of(function)}"
    return Rehearsal(model=type(task.model).__name__, loss=loss)


def _advice(passes: Passes, price: float) -> list[tuple[str, str]]:
    """Warnings of what is right, and perhaps not meant."""
    task, data, workers = passes.task, passes.spec.data, passes.spec.placement.workers
    found = []
    unreached = [c.name for c in passes.model.constants if isinstance(task, Task) and c.name in trainable(task)]
    if unreached:
        shown = ", ".join(unreached[:3]) + (f" and {len(unreached) - 3} more" if len(unreached) > 3 else "")
        found.append(("unreached_parameters", f"the loss does not depend on {shown}: not trained"))
    if isinstance(task, Task) and task.metrics and task.eval_data is None:
        problem = f"{', '.join(task.metrics)}: metrics are of evaluations, and the task has no eval_data"
        found.append(("metrics_without_data", problem))
    halves = sorted({p.held for p in passes.model.parameters if p.held and not p.is_complex})
    if halves:
        found.append(("float32_masters", _MASTERS.format(" and ".join(halves))))
    if workers > data.num_micro_batches:
        problem = (
            f"a step has {data.num_micro_batches} micro-batches for {workers} workers, so some have nothing to do: set "
            f"placement.max_workers = {workers}, or a smaller data.micro_batch"
        )
        found.append(("idle_workers", problem))
    if price > EXPENSIVE and passes.seconds > NOTICEABLE_SECONDS and workers < data.num_micro_batches:
        problem = (
            f"the {data.num_micro_batches} micro-batches of a step take {price:.1f} times as long, one after another, "
            f"as its {data.global_batch} samples at once: with {workers} workers, micro-batches of more than "
            f"{data.micro_batch_size} samples are faster (data.micro_batch)"
        )
        found.append(("small_micro_batch", problem))
    return found


def _advice_on_average(task: Task | AnalyticTask, spec: TrainingJobSpec) -> list[tuple[str, str]]:
    """A warning of evaluations whose statistics are not of the parameters that are evaluated."""
    if isinstance(task, AnalyticTask) or not evaluates_average(spec.average, spec.optimizer):
        return []
    known = [name for name, _ in task.model.named_buffers() if name.rpartition(".")[2] == "running_mean"]
    return [("average_statistics", _STATISTICS.format(known[0]))] if known else []


def _check_data(passes: Passes, indices: NDArray[np.int64]) -> None:
    """A sample is the same whenever it is fetched with the same seeds."""
    task, spec = passes.task, passes.spec
    first, again = passes.fetch(indices), None
    if isinstance(task, Task):  # a stream keeps what it has read
        again = source_of(task.train_data, task.collate)
        again.prepare(passes.num_samples, spec.data, spec.seed, shuffle=spec.data.shuffle)
    if not same(first, passes.fetch(indices, again)):
        raise TaskError(
            "task.train_data",
            f"train_data gave other values for the samples {some(indices)} when they were fetched a second time with "
            "the same seeds, so it draws from a generator of its own: have it draw from torch's, NumPy's or Python's "
            "global generator, which are seeded for every micro-batch",
        )


def _check_repeats(passes: Passes, indices: NDArray[np.int64]) -> None:
    """The same micro-batch gives the same gradient, and leaves nothing behind."""
    states = []
    one, two = passes.gradient("part"), passes.gradient("total")
    for into in (one, two):
        passes.compute(indices, into)
        states.append(passes.hidden())
    differing = differences(*states)
    if differing:
        raise TaskError(
            "task",
            f"{differing[0].lstrip('.')} has another value after every pass, and each worker would count for itself: "
            "make it a buffer of the module (register_buffer), which all workers share, or leave it out",
        )
    if not torch.equal(one, two) and not bool(torch.isnan(one).any()):
        raise TaskError(
            "task",
            "the same micro-batch gave two different gradients with the same seeds, so model or loss draw from a "
            "generator of their own or keep a state: draw from torch's global generator, and keep state in buffers",
        )


def _check_recomputing(passes: Passes, indices: NDArray[np.int64], how: str) -> None:
    """Activations that are computed again give the same gradient. From here on they are."""
    task = passes.task
    field = "memory.checkpoint_activations"
    if not how:
        return
    if not isinstance(task, Task):
        raise TaskError(field, "an AnalyticTask has no activations that are known here; leave it out")
    kept, again = passes.gradient("part"), passes.gradient("total")
    passes.compute(indices, kept)
    try:
        checkpoint_activations(task.model, how)
    except RecomputeError as error:
        raise TaskError(field, f"{how!r}: {error}") from error
    try:
        passes.compute(indices, again)
    except TaskError as error:
        problem = f"with activations computed again ({how!r}) the backward pass fails: {error.message}"
        raise TaskError(field, problem, error.traceback) from error
    if not torch.equal(kept, again) and not bool(torch.isnan(kept).any()):
        raise TaskError(
            field,
            f"the gradient is another one when activations are computed again ({how!r}), so forward draws from a "
            "generator that is not torch's, or keeps a state: have it draw by torch.rand or nn.Dropout, and keep state "
            "in buffers",
        )


def _check_second_derivatives(passes: Passes, indices: NDArray[np.int64]) -> None:
    """The job can have those that it asks for, with the model as it is by now."""
    if passes.spec.telemetry.curvature_every:
        passes.look_at_curvature(indices)
    if multiplies(passes.spec.optimizer):
        passes.multiply(indices)


def _check_one_function(passes: Passes, indices: NDArray[np.int64]) -> None:
    """Raises TaskError when steps would not all be of the same function."""
    name = passes.spec.optimizer.name
    first, second = passes.gradient("part"), passes.gradient("total")
    passes.compute(indices, first, seed=1)
    passes.compute(indices, second, seed=2)
    if not torch.equal(first, second) and not bool(torch.isnan(first).any()):
        raise TaskError(
            "optimizer.name",
            f"{name} minimizes one function, and this loss draws random numbers (dropout, augmentation), others in "
            "every step: have it draw none, or take another optimizer",
        )
    if passes.spec.data.shuffle and depends_on_the_cut(passes):
        raise TaskError(
            "data.shuffle",
            f"{name} minimizes one function, and what the model returns for a sample depends on the others of its "
            "micro-batch, which are shuffled: set data.shuffle=false",
        )


def _check_compiling(passes: Passes, indices: NDArray[np.int64]) -> None:
    """The compiled model gives the same gradient, up to rounding. From here on it is compiled."""
    task = passes.task
    if not passes.spec.compile:
        return
    if not isinstance(task, Task):
        raise TaskError("compile", "an AnalyticTask has no model for torch.compile; leave it out")
    expected, found = passes.gradient("part"), passes.gradient("total")
    passes.compute(indices, expected)
    compile_model(task.model)
    try:
        passes.compute(indices, found)
    except TaskError as error:
        problem = f"the compiled model fails (it needs a C++ compiler where workers run): {error.message}"
        raise TaskError("compile", problem, error.traceback) from error
    difference = float(torch.linalg.vector_norm(found - expected))
    if difference > tolerance_of(passes) * float(torch.linalg.vector_norm(expected)):
        problem = "the compiled model has another gradient, so torch.compile does not keep what the model does"
        raise TaskError("compile", f"{problem}: leave compile out, or compile a part of the model in the task")


def _check_last_step(passes: Passes) -> None:
    """The last micro-batch of an epoch may be short."""
    spec, every, last = passes.spec, passes.every, passes.every.steps_per_epoch - 1
    if spec.total_steps(passes.num_samples) <= last:
        return
    sizes = [len(every.indices(last, index)) for index in range(spec.data.num_micro_batches)]
    short = min((size for size in sizes if size), default=0)
    if not short or short == passes.samples or short >= spec.data.micro_batch_size:
        return
    try:
        passes.compute(passes.sampler.indices(0, 0)[:short], what="the last micro-batch of an epoch")
    except TaskError as error:
        raise TaskError(
            "data.global_batch",
            f"the last step of every epoch ends with a micro-batch of {short} of the {passes.num_samples} samples, and "
            f"that fails: {error.message}; set data.drop_last = true, or another global_batch or micro_batch",
            error.traceback,
        ) from error


def _check_evaluation(passes: Passes, num_samples: int) -> bool:
    """Evaluate some samples; whether that needs gradients."""
    task, engine, spec, source = passes.task, passes.engine, passes.spec, passes.engine.eval_source
    if source is None:
        return False
    size = min(num_samples, spec.data.evaluation_batch)
    if passes.seconds * size / max(passes.samples, 1) > SLOW_SECONDS:
        size = min(size, FEW_SAMPLES)
    with blamed("task.eval_data", "fetching samples of eval_data"):
        source.prepare(num_samples, spec.data, spec.seed, shuffle=False)
        passes.seed(purpose=EVALUATE)
        batch = source.batch(np.arange(size, dtype=np.int64))
    with passes.unwritten():
        if not isinstance(task, Task) or not isinstance(engine, TorchEngine):
            passes.evaluate(batch, size)
            return False
        engine.evaluates_with_gradients = bool(task.evaluation_needs_gradients)
        try:
            passes.evaluate(batch, size)
        except TaskError as error:
            if task.evaluation_needs_gradients is not None:
                raise
            engine.evaluates_with_gradients = True
            try:
                passes.evaluate(batch, size)
            except TaskError:
                raise error from None  # not for want of gradients
    return engine.evaluates_with_gradients
