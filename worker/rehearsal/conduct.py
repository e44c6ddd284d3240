"""How a task's tensors behave in its first pass."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from steepest.task import Task
from worker.gradients.torch_engine import TorchEngine
from worker.rehearsal.passes import Passes
from worker.task.load import TaskError
from worker.task.model import Conduct
from worker.task.state import roots

OTHER_PASSES = 4  # before a parameter without a gradient counts as not reached


class OtherConductError(Exception):
    """Tensors behave in another way than the description says. conduct: how; describe the task again with it."""

    def __init__(self, conduct: Conduct) -> None:
        self.conduct = conduct
        super().__init__(str(conduct))


def watch_first_pass(passes: Passes, indices: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.int64]:
    """Compute a few samples, or the whole micro-batch if few do not work; the samples that do.

    Raises OtherConductError for frozen parameters that move, and for parameters that the loss does not reach; TaskError
    for a task that cannot be computed, writes to parameters or creates some.
    """
    task, engine = passes.task, passes.engine
    if not isinstance(task, Task) or not isinstance(engine, TorchEngine):
        return indices
    names = trainable(task)
    before = {name: tensor.detach().clone() for name, tensor in passes.frozen.items()}
    with passes.unwritten():
        try:
            passes.compute(indices)
        except TaskError as error:
            if error.traceback and len(whole) > len(indices):  # a state of a fixed size may need all of it
                return watch_first_pass(passes, whole, whole)
            if not _moved(passes, task, before):
                raise
    everything = {p.name for p in passes.layout.parameters}
    unreached = set(engine.missed)
    for other in range(1, OTHER_PASSES):
        if not unreached:
            break
        chosen = passes.sampler.indices(other % passes.sampler.steps_per_epoch, 0)[: len(indices)]
        passes.compute(chosen, seed=passes.spec.seed + other)
        unreached &= set(engine.missed)
    unreached = set() if unreached == everything else unreached  # samples that weigh nothing
    moved = _moved(passes, task, before)
    if moved or unreached:
        raise OtherConductError(Conduct(frozenset(moved), frozenset(unreached)))
    if (new := trainable(task)) != names:
        raise TaskError(
            "task.model",
            f"the first pass changed which parameters there are or which are trained ({min(new ^ names)!r}); create "
            "them in __init__, and freeze before the job starts",
        )
    return indices


def trainable(task: Task) -> set[str]:
    """The names of the parameters that require gradients."""
    return {n for prefix, root in roots(task) for n, p in root.named_parameters(prefix[:-1]) if p.requires_grad}


def _moved(passes: Passes, task: Task, before: Mapping[str, torch.Tensor]) -> list[str]:
    """Frozen parameters that have another value now, and are no buffers yet."""
    now = {n: p for prefix, root in roots(task) for n, p in root.named_parameters(prefix[:-1])}
    known = {b.name for b in passes.model.buffers}
    return [n for n, tensor in before.items() if n not in known and not torch.equal(now[n].detach(), tensor)]
