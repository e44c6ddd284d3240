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

from steepest.spec import TrainingJobSpec
from worker.rehearsal.fingerprint import fingerprint
from worker.rehearsal.rehearse import rehearse
from worker.task.load import TaskError, load_task
from worker.task.model import check_fits, describe_model, num_samples


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """What the service needs to know of a task (see TaskDescription), or what is wrong with it."""
    torch.set_num_threads(1)
    sys.path += [entry for entry in request["path"] if entry not in sys.path]  # of the service, as workers have it
    spec = TrainingJobSpec.model_validate(request["spec"])
    code = Path(request["code"]) if request["code"] else None
    try:
        task = load_task(spec.task, code, spec.seed)
        model = describe_model(task)
        check_fits(task, model, spec.precision, spec.placement.device)
        samples = num_samples(task.train_data, "train_data")
        evaluation = 0 if task.eval_data is None else num_samples(task.eval_data, "eval_data")
        seen = fingerprint(task)
        found = rehearse(task, spec, model, samples, code)
    except TaskError as error:
        return {"field": error.field, "message": error.message, "traceback": error.traceback}
    return {
        "model": model.to_dict(),
        "num_samples": samples,
        "num_evaluation_samples": evaluation,
        "metric_names": list(task.metrics),
        "evaluates_with_gradients": found.evaluates_with_gradients,
        "caches": found.caches,
        "fingerprint": seen,
        "warnings": found.warnings,
        "batch": found.batch,
        "weight": found.weight,
        "seconds": found.seconds,
        "samples": found.samples,
    }


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
