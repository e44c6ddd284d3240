"""Whether what a job asks for agrees with its task, as a rehearsal found it."""

from __future__ import annotations

from fnmatch import fnmatchcase

from ps.compression.choose import compression_problem
from ps.wire.connection import MAX_MESSAGE_BYTES
from services.jobs.task_probe import TaskDescription
from steepest.errors import SpecError, Violation
from steepest.full_batch_spec import DIFFERENCES
from steepest.spec import TrainingJobSpec

MESSAGE_ROOM = 1 << 20  # for what else is in a message


def check_agreement(spec: TrainingJobSpec, description: TaskDescription) -> None:
    """Raises SpecError, with the first field that does not."""
    _check_messages(spec, description)
    _check_best(spec, description)
    _check_decay(spec, description)
    _check_names(spec, description)
    _check_compression(spec, description)
    _check_length(spec, description)


def _check_compression(spec: TrainingJobSpec, description: TaskDescription) -> None:
    problem = compression_problem(spec.compression, description.layout(spec))
    if problem:
        raise SpecError([Violation("compression.name", f"{spec.compression.name!r}: {problem}")])


def _check_length(spec: TrainingJobSpec, description: TaskDescription) -> None:
    total_steps = spec.total_steps(description.num_samples)
    if spec.schedule.warmup_steps >= total_steps:
        problem = f"{spec.schedule.warmup_steps} leaves nothing of the {total_steps} steps of the job"
        raise SpecError([Violation("schedule.warmup_steps", problem)])


def _check_best(spec: TrainingJobSpec, description: TaskDescription) -> None:
    """Raises SpecError when there is no such metric."""
    if not spec.best.is_on:
        return
    if not description.num_evaluation_samples:
        problem = "the best checkpoint, and patience, go by evaluations, and the task has no eval_data"
        raise SpecError([Violation("best", problem)])
    metrics = ["loss", *description.metric_names]
    if spec.best.metric_name not in metrics:
        problem = f"{spec.best.metric_name!r} is not evaluated by the task; there are: {', '.join(metrics)}"
        raise SpecError([Violation("best.metric", problem)])


def _check_decay(spec: TrainingJobSpec, description: TaskDescription) -> None:
    """Raises SpecError for a group that asks for a weight decay of an optimizer without one."""
    if spec.optimizer.name == "rprop" and any(group.weight_decay for group in description.model.groups):
        problem = "'rprop' has no weight decay, and a parameter group of the task sets one"
        raise SpecError([Violation("optimizer.name", problem)])


def _check_names(spec: TrainingJobSpec, description: TaskDescription) -> None:
    """Raises SpecError for a pattern that no parameter has a name of, and for parameters that agc does not know."""
    if spec.clip.agc is not None and any(p.is_complex for p in description.model.parameters):
        raise SpecError([Violation("clip.agc", "the model has complex parameters, whose units it does not know")])
    names = [p.name for p in description.model.parameters]
    for pattern in spec.clip.agc.exclude if spec.clip.agc is not None else ():
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
            problem = f"{pattern!r} is the name of no parameter; there are: {shown}"
            raise SpecError([Violation("clip.agc.exclude", problem)])


def _check_messages(spec: TrainingJobSpec, description: TaskDescription) -> None:
    """Raises SpecError for what would not fit the message that it travels in."""
    size = description.layout(spec).nbytes + sum(tensor.nbytes for tensor in description.model.buffers)
    if description.products not in ("", DIFFERENCES) and size > MAX_MESSAGE_BYTES - MESSAGE_ROOM:
        problem = f"a direction, with buffers, has {size / 2**30:.1f} GiB; at most 1 GiB can travel between processes"
        raise SpecError([Violation("optimizer.products", f"{problem}: take lbfgs")])
    for what, tensors in (("frozen parameters", description.model.constants), ("buffers", description.model.buffers)):
        size = sum(tensor.nbytes for tensor in tensors)
        if size > MAX_MESSAGE_BYTES - MESSAGE_ROOM:
            problem = f"its {what} are {size / 2**30:.1f} GiB; at most 1 GiB of them can travel between processes"
            raise SpecError([Violation("task.model", problem)])
