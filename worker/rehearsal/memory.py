"""What a pass takes in memory, and what to compute again so that it keeps within a budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from steepest.full_batch_spec import multiplies
from steepest.task import Task
from worker.gradients.peak_memory import PeakMemory
from worker.gradients.recompute import ALL, SQRT, RecomputeError, checkpoint_activations
from worker.rehearsal.passes import Passes
from worker.task.load import TaskError

BUDGET = "memory.activation_budget"
UNKNOWN = "what a pass of this task takes cannot be measured (it is no task of torch, say); leave it out"


def peak_bytes(passes: Passes, indices: NDArray[np.int64], samples: int) -> int:
    """How much memory the tensors of a micro-batch's forward and backward pass take at most; 0 where it is not known.

    Of what is looked at in some steps, too. indices: of samples of it. samples: that it has: when those are fewer,
    twice as many say what each further one takes.
    """
    few = _peak(passes, indices)
    if len(indices) >= samples or not few:
        return few
    more = passes.sampler.indices(0, 0)[: 2 * len(indices)]
    each = max(0, _peak(passes, more) - few) / (len(more) - len(indices))
    return int(few + each * (samples - len(indices)))


def _peak(passes: Passes, indices: NDArray[np.int64]) -> int:
    if not isinstance(passes.task, Task):
        return 0
    try:
        with PeakMemory() as memory:
            passes.compute(indices)
            if passes.spec.telemetry.curvature_every:
                passes.look_at_curvature(indices)
            if multiplies(passes.spec.optimizer):
                passes.multiply(indices)
    except TaskError:  # the same pass is fine without being watched
        return 0
    return int(memory.peak)


def plan(passes: Passes, indices: NDArray[np.int64], samples: int) -> str:
    """What to compute again (of memory.checkpoint_activations; nothing if it need not be) to keep within the budget.

    Leaves the model as it is. Raises TaskError when nothing is enough.
    """
    budget, task = passes.spec.memory.activation_budget, passes.task
    found = {"": peak_bytes(passes, indices, samples)}
    if not found[""]:
        raise TaskError(BUDGET, UNKNOWN)
    assert isinstance(task, Task)  # noqa: S101  # else it is not known
    for how in (SQRT, ALL):
        if min(found.values()) <= budget:
            break
        before = {module: module.__dict__.get("forward") for module in task.model.modules()}
        try:
            checkpoint_activations(task.model, how)
            found[how] = peak_bytes(passes, indices, samples)
        except RecomputeError:
            continue
        finally:
            for module, forward in before.items():
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.__dict__["forward"] = forward
    how = min(found, key=lambda each: found[each])
    if found[how] > budget:
        raise TaskError(BUDGET, too_much(found[how], budget, samples, list(found)))
    return how


def too_much(peak: int, budget: int, samples: int, tried: Sequence[str]) -> str:
    """Why a job is refused. tried: what was computed again."""
    again = ", ".join(filter(None, tried))
    how = f", with memory.checkpoint_activations = {again} at best" if again else ""
    return (
        f"a micro-batch of {samples} samples takes {peak / 1e6:.1f} MB at its peak{how}, and the budget is "
        f"{budget / 1e6:.1f} MB: set a smaller data.micro_batch (about {max(1, samples * budget // peak)})"
    )
