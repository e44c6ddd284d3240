"""Whether a step in several micro-batches gives what it gives in one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils import _pytree

from steepest.spec import REVERSE
from steepest.task import Task
from worker.data.streams import is_stream
from worker.gradients.losses import COUNTS, IGNORED, loss_of
from worker.gradients.torch_engine import TorchEngine
from worker.rehearsal.passes import Passes
from worker.rehearsal.words import same
from worker.task.load import TaskError

QUICK_SECONDS = 0.2  # a micro-batch that takes less is compared over whole steps, several times
BUDGET_SECONDS = 2.0
MAX_STEPS, MAX_PARTS = 3, 8
COUNTED_SAMPLES, KEPT_LABELS = 4, 2  # when labels are left out to see whether they count
TOLERANCE = {"full": 2e-3, "bf16": 5e-2}  # of sums in another order, relative

_RANDOM = (
    "the loss draws random numbers in evaluation mode, too, so it could not be checked that a step in several "
    "micro-batches gives what it gives in one"
)
_COUPLED = (
    "what the model returns for a sample depends on the other samples of its micro-batch, so a step in several "
    "micro-batches differs from one over the whole batch, as with batch normalization; micro_batch = global_batch "
    "gives what one batch gives"
)
_NOT_COMPARED = (
    "the task cannot take a batch larger than a micro-batch, so it could not be checked that a step in several "
    "micro-batches gives what it gives in one"
)

SCALE = 65536.0  # times the loss, to see whether its gradient follows; a larger one, for small ones may become zeros

Parts = Sequence[NDArray[np.int64]]


def tolerance_of(passes: Passes) -> float:
    """How much sums in another order may differ, relative."""
    is_rounded = any(p.held in ("bfloat16", "float16") for p in passes.model.parameters)
    return TOLERANCE["bf16" if is_rounded else passes.spec.precision]


@dataclass
class Compared:
    """price: how many times as long the micro-batches of a step take as its samples at once; 0: not measured.

    warnings: (code, message).
    """

    price: float = 0.0
    warnings: list[tuple[str, str]] = field(default_factory=list)


def compare_parts(passes: Passes) -> Compared:
    """Compare steps in micro-batches with the same samples at once, in evaluation mode.

    Raises TaskError when loss or gradient differ, but for what couples the samples of a batch or draws numbers.
    """
    _check_weight(passes, passes.sampler.indices(0, 0)[: 2 * MAX_PARTS])
    data, task, engine = passes.spec.data, passes.task, passes.engine
    found = Compared()
    if data.num_micro_batches == 1 or passes.num_samples <= data.micro_batch_size:
        return found
    if not isinstance(task, Task) or not isinstance(engine, TorchEngine):
        return found
    with engine.frozen():
        began = time.perf_counter()
        for parts in _steps(passes):
            problem = _compare(passes, parts, found)
            if problem is not None:
                if _is_random(passes, parts[0]):
                    found.warnings.append(("random_loss", _RANDOM))
                    return found
                if task.loss is not None and _couples(passes, task, parts) and _adds_up(passes, task, parts):
                    found.warnings.append(("coupled_samples", _COUPLED))
                    return found
                raise TaskError("task.batch_loss" if task.batch_loss is not None else "task.loss", problem)
            if time.perf_counter() - began > BUDGET_SECONDS:
                break
    return found


def choose_counts(passes: Passes) -> str:
    """What the mean of a model's own loss is over, of losses.COUNTS; empty for the samples, or for what is not known.

    Labels may be left out in samples that are never looked at here. So some are left out on purpose, almost all of one
    half of the samples, and whichever count gives these halves together what it gives their whole is it.
    """
    task, engine = passes.task, passes.engine
    if not isinstance(task, Task) or not isinstance(engine, TorchEngine):
        return ""
    if task.loss is not None or task.loss_weight is not None or not _has_labels(passes.fetched):
        return ""
    indices = passes.sampler.indices(0, 0)[: min(COUNTED_SAMPLES, max(passes.samples, 1))]
    if len(indices) < 2:
        return ""
    parts = np.array_split(indices, 2)
    found = ""
    with engine.frozen():
        passes.alter = partial(_with_labels_left_out, set(parts[0].tolist()))
        try:
            for counts in (*COUNTS, ""):
                engine.count(counts)
                if _compare(passes, parts, Compared()) is None:
                    found = counts
                    break
        except TaskError:  # the model takes no such labels
            found = ""
        finally:
            passes.alter = lambda batch, indices: batch
            engine.count(found)
    return found


def _has_labels(batch: Any) -> bool:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or labels.dim() != 2:
        return False
    return labels.shape[1] > KEPT_LABELS


def _with_labels_left_out(chosen: set[int], batch: Any, indices: NDArray[np.int64]) -> Any:
    """All labels of all samples count, but only the first few of those that are chosen."""
    labels = batch["labels"].clone()
    labels[labels == IGNORED] = 0
    labels[torch.tensor([index in chosen for index in indices.tolist()]), KEPT_LABELS:] = IGNORED
    return {**batch, "labels": labels}


def _steps(passes: Passes) -> Iterator[list[NDArray[np.int64]]]:
    """The micro-batches of a few steps; then samples from all over the data."""
    data, size, sampler = passes.spec.data, max(passes.samples, 1), passes.sampler
    few = range(min(data.num_micro_batches, MAX_PARTS))
    if passes.seconds > QUICK_SECONDS:
        whole = np.concatenate([sampler.indices(0, index) for index in few])[: 2 * size]
        if len(whole) > size:
            yield [whole[:size], whole[size:]]
        return
    for step in range(min(MAX_STEPS, sampler.steps_per_epoch)):
        parts = [part for part in (sampler.indices(step, index) for index in few) if len(part)]
        if len(parts) > 1:
            yield parts
    if not is_stream(getattr(passes.task.train_data, "dataset", passes.task.train_data)):
        spread = np.unique(np.linspace(0, passes.num_samples - 1, 4 * size).astype(np.int64))
        yield [part for part in np.array_split(spread, 4) if len(part)]


def _compare(passes: Passes, parts: Parts, found: Compared) -> str | None:
    """What is wrong, or None. A batch that the task cannot take as a whole is not compared."""
    part, total, reference = (passes.gradient(name) for name in ("part", "total", "reference"))
    total.zero_()
    losses, weight, norms = [], 0.0, 0.0
    began = time.perf_counter()
    batches, joined = _fetched(passes, parts)
    for indices, batch in zip(parts, batches, strict=True):
        measured = passes.compute(indices, part, batch=batch)
        losses.append(measured.loss)
        weight += measured.weight
        norms += _norm(part)
        total.add_(part)
    middle = time.perf_counter()
    try:
        together = passes.compute(np.concatenate(parts), reference, batch=joined)
    except TaskError:
        found.warnings.append(("not_compared", _NOT_COMPARED))
        return None
    if len(parts) == passes.spec.data.num_micro_batches:
        price = (middle - began) / (time.perf_counter() - middle)
        found.price = min(price, found.price or price)
    if weight <= 0 or together.weight <= 0:
        return None
    mean, whole = sum(losses) / weight, together.loss / together.weight
    total.div_(weight)
    reference.div_(together.weight)
    size = max(norms / weight, _norm(reference))
    off = _norm(total.sub_(reference))
    if not np.isfinite([mean, whole, off]).all():
        return None  # the job itself says what is not finite
    tolerance = tolerance_of(passes)
    scale = max(abs(whole), sum(map(abs, losses)) / weight)
    if abs(mean - whole) <= tolerance * scale + 1e-7 and off <= tolerance * size + 1e-7:
        return None
    return (
        f"the loss is not a mean over the samples: {len(parts)} micro-batches of one step give {mean:.6g} and a "
        f"gradient that is {off / max(size, 1e-30):.1%} off from the {whole:.6g} of all their samples together. "
        "Return (sum, weight) from batch_loss, or give the task loss_weight(batch), what the mean is over: the "
        "number of targets that count, say. A loss that compares the samples of a batch with each other needs the "
        f"step in one piece: micro_batch = {passes.spec.data.global_batch}"
    )


def _fetched(passes: Passes, parts: Parts) -> tuple[list[Any], Any]:
    """The batch of each part, and that of all: None, to be fetched, unless samples are others every time."""
    batches = [passes.fetch(indices) for indices in parts]
    if same(passes.fetch(parts[0], seed=1), passes.fetch(parts[0], seed=2)):
        return batches, None
    return batches, _joined(batches, [len(indices) for indices in parts])


def _joined(batches: Sequence[Any], sizes: Sequence[int]) -> Any:
    """One batch of several, whose tensors all have a row for each sample; None for others."""
    flat = [_pytree.tree_flatten(batch) for batch in batches]
    leaves = [own for own, _ in flat]
    if any(structure != flat[0][1] for _, structure in flat):
        return None
    for own, size in zip(leaves, sizes, strict=True):
        if not all(isinstance(leaf, torch.Tensor) and leaf.dim() and len(leaf) == size for leaf in own):
            return None
    columns = list(zip(*leaves, strict=True))
    if any(len({leaf.shape[1:] for leaf in column}) > 1 for column in columns):
        return None
    return _pytree.tree_unflatten([torch.cat(column) for column in columns], flat[0][1])


def _check_weight(passes: Passes, indices: NDArray[np.int64]) -> None:
    """Raises TaskError for a weight of the user's own that is not that of the parts, added up."""
    task, engine = passes.task, passes.engine
    own = isinstance(task, Task) and (task.batch_loss is not None or task.loss_weight is not None)
    if not own or not isinstance(engine, TorchEngine) or len(indices) < 2:
        return
    parts = np.array_split(indices, 2)
    with engine.frozen():
        batches, joined = _fetched(passes, parts)
        if joined is None and not same(passes.fetch(parts[0], seed=1), passes.fetch(parts[0], seed=2)):
            return
        try:
            weights = [passes.compute(i, batch=batch).weight for i, batch in zip(parts, batches, strict=True)]
            whole = passes.compute(np.concatenate(parts), batch=joined).weight
            drawn = [passes.compute(parts[0], seed=seed, batch=batches[0]).weight for seed in (1, 2)]
        except TaskError:  # not with batches of this size
            return
    if math.isclose(sum(weights), whole, rel_tol=1e-4) or drawn[0] != drawn[1]:
        return
    what = "batch_loss returned" if isinstance(task, Task) and task.loss_weight is None else "loss_weight gave"
    halves = " and ".join(f"{weight:.6g}" for weight in weights)
    raise TaskError(
        "task.batch_loss" if isinstance(task, Task) and task.batch_loss is not None else "task.loss_weight",
        f"{what} {whole:.6g} as the weight of {sum(map(len, parts))} samples and {halves} for their halves; a weight "
        "is what the loss sum is divided by, and adds up. To have a number logged, return (loss, {name: number}); for "
        "a mean over something else, in steps that are one micro-batch, return the mean alone",
    )


def check_linear(passes: Passes, indices: NDArray[np.int64]) -> None:
    """Raises TaskError for a backward pass whose gradient does not follow the loss, as one that clips does not."""
    engine = passes.engine
    if not isinstance(engine, TorchEngine) or passes.spec.derivative != REVERSE:
        return
    small, large = passes.gradient("part"), passes.gradient("total")
    try:
        for engine.scale, into in ((1.0, small), (SCALE, large)):
            passes.compute(indices, into)
    finally:
        engine.scale = 1.0
    large.div_(SCALE)
    size, off = max(_norm(small), _norm(large)), _norm(large.sub_(small))
    if not np.isfinite([size, off]).all() or off <= tolerance_of(passes) * size + 1e-7:
        return
    raise TaskError(
        "task.model",
        f"from a loss that is {SCALE:g} times as large, backward gives a gradient that is not, by {off / size:.1%}: "
        "a hook or an autograd.Function changes gradients on their way, as by clipping them, or the loss function "
        "calls backward itself. Workers go backward from sums of losses, so this would not be what a loop over batches "
        "does. Clip by the job's clip.norm, clip.value or clip.agc, and add up losses instead of calling backward",
    )


def _norm(gradient: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(gradient))


def depends_on_the_cut(passes: Passes) -> bool:
    """Whether a gradient in training mode changes with which samples share a micro-batch, as with batch statistics."""
    samples = passes.sampler.indices(0, 0)[: 2 * MAX_PARTS]
    if len(samples) < 4:  # two micro-batches of two
        return False
    half = len(samples) // 2
    part, totals = passes.gradient("part"), (passes.gradient("total"), passes.gradient("reference"))
    cuts = ((samples[:half], samples[half : 2 * half]), (samples[: 2 * half : 2], samples[1 : 2 * half : 2]))
    for total, cut in zip(totals, cuts, strict=True):
        total.zero_()
        for indices in cut:
            passes.compute(indices, part)
            total.add_(part)
    one, other = totals
    return _norm(one - other) > tolerance_of(passes) * _norm(other) + 1e-7


def _is_random(passes: Passes, indices: NDArray[np.int64]) -> bool:
    """Whether the loss draws numbers even in evaluation mode; then another cut of a step draws others."""
    return passes.compute(indices, seed=1).loss != passes.compute(indices, seed=2).loss


def _outputs(passes: Passes, task: Task, batches: Sequence[Any]) -> list[tuple[Any, Any]]:
    """(outputs, targets) of the model for each batch."""
    found = []
    for *inputs, targets in batches:
        passes.seed()
        with torch.no_grad():
            found.append((task.model(*inputs), targets))
    return found


def _couples(passes: Passes, task: Task, parts: Parts) -> bool:
    """Whether the model's outputs for a sample depend on the others in its batch, as with batch norm."""
    batches, joined = _fetched(passes, parts)
    together = passes.fetch(np.concatenate(parts)) if joined is None else joined
    *apart, whole = [outputs for outputs, _ in _outputs(passes, task, [*batches, together])]
    if not all(isinstance(outputs, torch.Tensor) for outputs in [whole, *apart]):
        return False
    both = torch.cat(apart)
    tolerance = tolerance_of(passes)
    return both.shape != whole.shape or not torch.allclose(both, whole, rtol=tolerance, atol=tolerance)


def _adds_up(passes: Passes, task: Task, parts: Parts) -> bool:
    """Whether the loss alone, of the outputs that the model gives for micro-batches, is a mean by the weights."""
    weighed = loss_of(replace(task, model=_Given()))
    found = _outputs(passes, task, [passes.fetch(part) for part in parts])
    whole = torch.cat([outputs for outputs, _ in found]), torch.cat([targets for _, targets in found])
    sizes = [len(part) for part in parts]
    with torch.no_grad():
        apart = [weighed(pair, size) for pair, size in zip(found, sizes, strict=True)]
        together = weighed(whole, sum(sizes))
    mean = sum(v.value.item() * v.factor for v in apart) / sum(v.weight for v in apart)
    expected = together.value.item() * together.factor / together.weight
    return math.isclose(mean, expected, rel_tol=tolerance_of(passes))


class _Given(torch.nn.Module):
    """Returns what it is given."""

    def forward(self, outputs: Any) -> Any:
        return outputs
