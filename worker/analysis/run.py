"""The process that analyses a task: `python -m worker.analysis.run REQUEST REPLY`, both of them JSON files.

What it says on the way goes to stderr, a line for each step when that is no terminal.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ps.parameters.description import ModelDescription
from steepest.spec import TrainingJobSpec
from worker.analysis.curvature import Compact, measure
from worker.analysis.gradient_check import as_json, check_gradients
from worker.analysis.subject import Question
from worker.analysis.team import Team
from worker.task.load import TaskError, said, user_traceback

CHECK, CURVATURE = "check_gradients", "curvature"
HESSIAN, GAUSS_NEWTON = "hessian", "gauss_newton"


def answer(request: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """What was asked for, or `field` and `message` of what is wrong."""
    sys.path += [entry for entry in request["path"] if entry not in sys.path]  # of the service, as workers have it
    question = Question(
        TrainingJobSpec.model_validate(request["spec"]),
        Path(request["code"]) if request["code"] else None,
        ModelDescription.from_dict(request["model"]),
        request["num_samples"],
        request.get("weights", ""),
        freezes=request["kind"] == CURVATURE,
    )
    try:
        with Team(question, request["processes"]) as team:
            if request["kind"] == CHECK:
                methods = {"expected": request["expected"], "got": request["got"]}
                checked = check_gradients(
                    team, request["processes"], **methods, tolerance=request["tolerance"], say=say
                )
                return as_json(checked, team.subject)
            return _curvature(team, request, say)
    except TaskError as error:
        return {"field": error.field, "message": error.message, "traceback": error.traceback}
    except ValueError as error:
        return {"field": "task", "message": str(error), "traceback": ""}
    except Exception as error:
        return {"field": "task", "message": said(error), "traceback": user_traceback(error)}


def _curvature(team: Team, request: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    layout = team.subject.layout
    positions = np.concatenate([np.arange(p.offset, p.offset + p.numel) for p in layout.parameters])
    loss, gradient = team.gradient()
    matrix = request["matrix"]
    products = {HESSIAN: team.hessian_product, GAUSS_NEWTON: team.gauss_newton_product}
    product = Compact(products[matrix], layout.numel, positions)
    found = measure(product, loss, gradient[positions], top=request["top"], seed=request["spec"]["seed"], say=say)
    singular: list[float] = []
    if request["jacobian"]:
        say("the Jacobian of the outputs")
        rows = team.subject.jacobian(request["jacobian"])
        squares = np.linalg.eigvalsh(rows @ rows.T)[::-1]  # of the tangent kernel, which is much the smaller matrix
        singular = np.sqrt(np.maximum(squares, 0.0)).tolist()
    about = {"matrix": matrix, "jacobian_singular_values": singular}
    return {**found.to_dict(), **about, "samples": request["num_samples"], "parameters": len(positions)}


def _say(text: str) -> None:
    end = "\r\x1b[2K" if sys.stderr.isatty() else "\n"
    sys.stderr.write(f"{text}{end}")
    sys.stderr.flush()


def main() -> None:
    """Entry point of the process."""
    request = json.loads(Path(sys.argv[1]).read_text())
    reply = json.dumps(answer(request, _say))
    Path(sys.argv[2]).write_text(reply)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # not waiting for threads that user code has left running


if __name__ == "__main__":
    main()
