"""Loads a task in a process of its own, describes and rehearses it: `python -m worker.rehearsal.probe REQUEST REPLY`.

Both are JSON files. User code may do anything on import; the service only ever reads the reply.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from ps.job.config import layout_of
from ps.job.environment import set_variables
from steepest.change_spec import samples_left_out
from steepest.errors import SpecError
from steepest.full_batch_spec import DIFFERENCES, HESSIAN, NewtonCgSpec
from steepest.spec import TrainingJobSpec, spec_from_dict
from steepest.task import AnalyticTask, Task
from worker.data.loader import LoaderData
from worker.data.streams import is_stream
from worker.gradients.activations import Activations
from worker.rehearsal.conduct import OtherConductError
from worker.rehearsal.derivative import check_derivative
from worker.rehearsal.fingerprint import fingerprint
from worker.rehearsal.optimizer import check_optimizer
from worker.rehearsal.rehearse import rehearse
from worker.task.load import TaskError, initialize, load_task
from worker.task.model import check_fits, describe_model, fan_in, num_samples
from worker.task.schedule import factors_of
from worker.task.state import roots


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """What the service needs to know of a task (see TaskDescription), or what is wrong with it."""
    torch.set_num_threads(1)
    sys.path += [entry for entry in request["path"] if entry not in sys.path]  # of the service, as workers have it
    spec = TrainingJobSpec.model_validate(request["spec"])
    code = Path(request["code"]) if request["code"] else None
    set_variables(spec.environment, request.get("secrets", {}))
    try:
        task = _loaded(spec, code)
        model = describe_model(task)
        check_fits(task, model, spec.precision, spec.placement.device)
        wishes = task.train_data.wishes.unless_set(request["set"]) if isinstance(task.train_data, LoaderData) else {}
        spec = _with_products(_with_wishes(spec, wishes), task)
        most = None if spec.steps is None else spec.steps * spec.data.global_batch
        samples = num_samples(task.train_data, "train_data", most)
        if not spec.data.steps_per_epoch(samples):
            problem = f"nothing is left of {samples} samples: a step has {spec.data.global_batch} (data.global_batch)"
            raise TaskError("data.drop_last", problem)
        evaluation = 0 if task.eval_data is None else num_samples(task.eval_data, "eval_data")
        _check_changes(spec, task)
        factors = factors_of(task, spec, samples)
        check_optimizer(spec, model, layout_of(model, spec), samples)
        check_derivative(spec, task, model)
        seen = fingerprint(task)
        fans = fan_in(task)
        activations = Activations(roots(task)).names if isinstance(task, Task) else ()
        try:
            found = rehearse(task, spec, model, samples, evaluation, code)
        except OtherConductError as other:
            task = _loaded(spec, code)
            model = describe_model(task, other.conduct)
            found = rehearse(task, spec, model, samples, evaluation, code)
    except TaskError as error:
        return {"field": error.field, "message": error.message, "traceback": error.traceback}
    return {
        "model": model.to_dict(),
        "data": wishes,
        "products": spec.optimizer.products if isinstance(spec.optimizer, NewtonCgSpec) else "",
        "num_samples": samples,
        "num_evaluation_samples": evaluation,
        "metric_names": list(task.metrics),
        "evaluates_with_gradients": found.evaluates_with_gradients,
        "caches": found.caches,
        "logged_names": found.logged,
        "fan_in": fans,
        "activations": activations,
        "loss_counts": found.counts,
        "fingerprint": seen,
        "warnings": found.warnings,
        "batch": found.batch,
        "weight": found.weight,
        "model_class": found.model,
        "loss": found.loss,
        "price": found.price,
        "recomputed": found.recomputed,
        "peak_bytes": found.peak_bytes,
        "factors": factors,
    }


def _with_products(spec: TrainingJobSpec, task: Task | AnalyticTask) -> TrainingJobSpec:
    """The spec with what newton_cg multiplies by, where it does not say."""
    optimizer = spec.optimizer
    if not isinstance(optimizer, NewtonCgSpec) or optimizer.products is not None:
        return spec
    products = DIFFERENCES if isinstance(task, AnalyticTask) else HESSIAN
    return spec.model_copy(update={"optimizer": optimizer.model_copy(update={"products": products})})


def _loaded(spec: TrainingJobSpec, code: Path | None) -> Task | AnalyticTask:
    task = load_task(spec.task, code, spec.seed)
    initialize(task, spec.init_from, strict=spec.init_strict)
    return task


def _check_changes(spec: TrainingJobSpec, task: Task | AnalyticTask) -> None:
    """Samples that are to be left out are there. A stream counts its samples on from epoch to epoch."""
    data: Any = task.train_data.dataset if isinstance(task.train_data, LoaderData) else task.train_data
    if is_stream(data):
        return
    size = len(data)
    for index, change in enumerate(spec.changes):
        if change.skip_samples and max(change.skip_samples) >= size:
            problem = f"{max(change.skip_samples)} is not there; allowed: 0 to {size - 1}, the samples of train_data"
            raise TaskError(f"changes.{index}.skip_samples", problem)
    left = size - len(samples_left_out(spec.changes))
    if not spec.data.steps_per_epoch(left):
        raise TaskError("changes", f"of {size} samples they leave {left}, and a step has {spec.data.global_batch}")


def _with_wishes(spec: TrainingJobSpec, wishes: dict[str, Any]) -> TrainingJobSpec:
    raw = spec.model_dump(mode="json", exclude_none=True)
    try:
        return spec_from_dict({**raw, "data": {**raw["data"], **wishes}})
    except SpecError as error:
        [violation, *_] = error.violations
        raise TaskError(violation.field, f"with the DataLoader's settings: {violation.problem}") from error


def main() -> None:
    """Entry point of the process."""
    request = json.loads(Path(sys.argv[1]).read_text())
    reply = json.dumps(probe(request))
    Path(sys.argv[2]).write_text(reply)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # not waiting for threads that user code has left running


if __name__ == "__main__":
    main()
