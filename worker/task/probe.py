"""Loads a task in a process of its own and describes it: `python -m worker.task.probe REQUEST REPLY`, both JSON files.

User code may do anything on import; the service only ever reads the reply.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from steepest.spec import TaskReference
from worker.task.load import TaskError, load_task
from worker.task.model import check_fits, describe_model, num_samples


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """The model's description, the sizes of the data sets and the names of the metrics; or what is wrong."""
    torch.set_num_threads(1)
    code = Path(request["code"]) if request["code"] else None
    try:
        task = load_task(TaskReference.model_validate(request["task"]), code, request["seed"])
        model = describe_model(task)
        check_fits(task, model, request["precision"], request["device"])
        return {
            "model": model.to_dict(),
            "num_samples": num_samples(task.train_data, "train_data"),
            "num_evaluation_samples": 0 if task.eval_data is None else num_samples(task.eval_data, "eval_data"),
            "metric_names": list(task.metrics),
        }
    except TaskError as error:
        return {"field": error.field, "message": error.message, "traceback": error.traceback}


def main() -> None:
    """Entry point of the process."""
    request = json.loads(Path(sys.argv[1]).read_text())
    reply = json.dumps(probe(request))
    Path(sys.argv[2]).write_text(reply)


if __name__ == "__main__":
    main()
