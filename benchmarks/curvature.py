"""How right the curvature of a model of 10,000 parameters is, against its dense Hessian.

`python -m benchmarks.curvature [--hidden 134] [--samples 500] [--steps 300] [--json FILE]`. A perceptron on the digits
is trained for some steps; then its Hessian is measured as `steepest curvature` does, with one, two and three processes
on an embedded cluster, and made densely from as many products as there are parameters. Prints the relative errors,
whether all numbers of processes gave the same bits, and, where curvlinops is installed, the largest difference of a
product from its own.
"""

from __future__ import annotations

import os

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import steepest
from benchmarks.report import RESULTS, write_report
from steepest.embedded import running_service
from steepest.spec import TrainingJobSpec
from worker.analysis.curvature import Compact
from worker.analysis.question import HESSIAN, CurvatureQuestion
from worker.analysis.subject import Subject
from worker.analysis.team import Team
from worker.task.load import initialize, load_task
from worker.task.model import describe_model

TOP = 5
TASK = "benchmarks/tasks.py:digits"


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
        settings = {"grpc_port": 0, "http_port": 0, "num_cpus": 3}
        with (
            running_service(Path(directory) / "service", **settings) as service,
            steepest.Client(f"127.0.0.1:{service.grpc_port}") as client,
        ):
            job = client.submit(
                TASK,
                arguments={"hidden": options.hidden},
                steps=options.steps,
                optimizer={"name": "adam", "lr": 1e-3},
                data={"global_batch": 100, "micro_batch": 100},
            )
            spec = job.wait().spec
            here = spec.task.model_copy(update={"module": "benchmarks.tasks"})
            spec = spec.model_copy(update={"task": here})
            results = []
            for processes in (1, 2, 3):
                began = time.perf_counter()
                results.append(job.curvature(top=TOP, samples=options.samples, processes=processes))
                found[f"seconds with {processes} processes"] = time.perf_counter() - began
            job.download(Path(directory))
        found["same bits"] = len(set(results)) == 1
        weights = str(Path(directory) / "model.safetensors")
        described = describe_model(load_task(spec.task, None, spec.seed))
        question = CurvatureQuestion(spec, described, options.samples, weights, top=TOP, matrix=HESSIAN, jacobian=0)
        team = Team(Subject(question))
        layout = team.subject.layout
        places = np.concatenate([np.arange(p.offset, p.offset + p.numel) for p in layout.parameters])
        product = Compact(team.hessian_product, layout.numel, places)
        dense = np.array([product(row) for row in np.eye(len(places))])
        vector = np.random.default_rng(0).standard_normal(len(places))
        own = product(vector)
        task = load_task(spec.task, None, spec.seed)
        initialize(task, weights, strict=True)
        model = task.model
        found["curvlinops difference"] = _difference(model, spec, options.samples, layout, vector, own)
    exact = np.linalg.eigvalsh((dense + dense.T) / 2)[::-1]
    [measured, *_] = results
    found |= {
        "parameters": len(places),
        "loss": measured.loss,
        "eigenvalues": list(measured.eigenvalues),
        "dense eigenvalues": exact[:TOP].tolist(),
        "largest error of an eigenvalue": float(np.max(np.abs(np.array(measured.eigenvalues) / exact[:TOP] - 1))),
        "error of the smallest": float(abs(measured.smallest_eigenvalue / exact[-1] - 1)),
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
