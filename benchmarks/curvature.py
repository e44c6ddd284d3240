"""How right the curvature of a model of 10,000 parameters is, against its dense Hessian.

`python -m benchmarks.curvature [--hidden 128] [--samples 500] [--steps 300] [--json FILE]`. A perceptron on the digits
is trained for some steps in this process; then its Hessian is measured as `steepest curvature` does, with one, two and
three processes, and made densely from as many products as there are parameters. Prints the relative errors, whether
all numbers of processes gave the same bits, and, where curvlinops is installed, the largest difference of a product
from its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.report import RESULTS, write_report
from steepest.spec import TrainingJobSpec, spec_from_dict
from worker.analysis.curvature import Compact, measure
from worker.analysis.subject import Question
from worker.analysis.team import Team
from worker.task.load import load_task
from worker.task.model import describe_model

TOP = 5


def _trained(hidden: int, steps: int, directory: Path) -> tuple[TrainingJobSpec, Any, Path]:
    """(spec, model, file of its parameters) after some steps of Adam over everything."""
    reference = {"module": "benchmarks.tasks", "function": "digits", "arguments": {"hidden": hidden}}
    data = {"global_batch": 100, "micro_batch": 100}
    spec = spec_from_dict({"task": reference, "epochs": 1, "data": data})
    torch.manual_seed(0)
    task = load_task(spec.task, None, spec.seed)
    inputs, targets = task.train_data.arrays
    optimizer = torch.optim.Adam(task.model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(task.model(inputs), targets).backward()
        optimizer.step()
    path = directory / "model.safetensors"
    save_file(task.model.state_dict(), path)
    return spec, task.model, path


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=134)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path, default=RESULTS / "curvature.json")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        spec, model, weights = _trained(options.hidden, options.steps, Path(directory))
        described = describe_model(load_task(spec.task, None, spec.seed))
        question = Question(spec, None, described, options.samples, str(weights), freezes=True)
        results = []
        for processes in (1, 2, 3):
            with Team(question, processes) as team:
                layout = team.subject.layout
                places = np.concatenate([np.arange(p.offset, p.offset + p.numel) for p in layout.parameters])
                product = Compact(team.hessian_product, layout.numel, places)
                loss, gradient = team.gradient()
                began = time.perf_counter()
                results.append(measure(product, loss, gradient[places], top=TOP))
                found[f"seconds with {processes} processes"] = time.perf_counter() - began
        found["same bits"] = len({json.dumps(each.to_dict()) for each in results}) == 1
        with Team(question, 2) as team:
            product = Compact(team.hessian_product, layout.numel, places)
            dense = np.array([product(row) for row in np.eye(len(places))])
            vector = np.random.default_rng(0).standard_normal(len(places))
            own = product(vector)
        found["curvlinops difference"] = _difference(model, spec, options.samples, layout, vector, own)
    exact = np.linalg.eigvalsh((dense + dense.T) / 2)[::-1]
    measured = results[0]
    found |= {
        "parameters": len(places),
        "loss": measured.loss,
        "eigenvalues": list(measured.eigenvalues),
        "dense eigenvalues": exact[:TOP].tolist(),
        "largest error of an eigenvalue": float(np.max(np.abs(np.array(measured.eigenvalues) / exact[:TOP] - 1))),
        "error of the smallest": float(abs(measured.smallest / exact[-1] - 1)),
        "trace": measured.trace,
        "error of the trace": float(abs(measured.trace / np.trace(dense) - 1)),
        "its standard error said": measured.trace_error / measured.trace,
    }
    for name, value in found.items():
        print(f"{name:35} {value}")
    write_report(options.json, **found)


def _difference(
    model: nn.Module, spec: TrainingJobSpec, samples: int, layout: Any, vector: np.ndarray, own: np.ndarray
) -> float | None:
    """The largest difference of a product from that of curvlinops, relative to the largest entry."""
    try:
        from curvlinops import HessianLinearOperator
    except ImportError:
        return None
    inputs, targets = (array[:samples] for array in load_task(spec.task, None, spec.seed).train_data.arrays)
    named = dict(model.double().named_parameters())
    ordered = [named[p.name] for p in layout.parameters]
    operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), ordered, [(inputs.double(), targets)])
    theirs = (operator @ torch.from_numpy(vector)).detach().numpy()
    return float(np.max(np.abs(own - theirs)) / np.max(np.abs(theirs)))


if __name__ == "__main__":
    main()
