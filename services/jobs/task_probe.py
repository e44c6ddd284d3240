"""Asks a process of its own what a submitted task is, before anything is started for it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ps.parameters.description import ModelDescription
from ps.parameters.layout import Layout, build_layout
from steepest.errors import SpecError, Violation
from steepest.spec import TrainingJobSpec


@dataclass(frozen=True)
class TaskDescription:
    """What the service needs to know of a task."""

    model: ModelDescription
    num_samples: int
    num_evaluation_samples: int
    metric_names: tuple[str, ...]

    def layout(self, spec: TrainingJobSpec) -> Layout:
        """How the parameters of the job lie."""
        return build_layout(self.model, decay_biases_and_norms=spec.optimizer.decay_biases_and_norms)

    def to_json(self) -> str:
        """A form that the store can keep."""
        return json.dumps(
            {
                "model": self.model.to_dict(),
                "num_samples": self.num_samples,
                "num_evaluation_samples": self.num_evaluation_samples,
                "metric_names": self.metric_names,
            }
        )

    @staticmethod
    def from_json(text: str) -> TaskDescription:
        """The inverse of `to_json`."""
        raw = json.loads(text)
        return TaskDescription(
            ModelDescription.from_dict(raw["model"]),
            raw["num_samples"],
            raw["num_evaluation_samples"],
            tuple(raw["metric_names"]),
        )


def probe_task(spec: TrainingJobSpec, code: Path | None, timeout_seconds: float) -> TaskDescription:
    """Load the task and describe it. Raises SpecError, with the traceback of the user's code if that raised."""
    with tempfile.TemporaryDirectory(prefix="steepest-probe-") as directory:
        request, reply, output = (Path(directory) / name for name in ("request", "reply", "output"))
        task = spec.task.model_dump(mode="json")
        wanted = {"seed": spec.seed, "precision": spec.precision, "device": spec.placement.device}
        request.write_text(json.dumps({"task": task, "code": str(code or ""), **wanted}))
        with output.open("wb") as stream:
            try:
                status = subprocess.run(
                    [sys.executable, "-m", "worker.task.probe", str(request), str(reply)],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    timeout=timeout_seconds,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                problem = f"{spec.task.module}:{spec.task.function} did not return within {timeout_seconds:g} s"
                raise SpecError([Violation("task.function", problem)]) from None
        if not reply.exists():
            tail = output.read_bytes()[-2000:].decode(errors="replace").strip()
            problem = (
                f"loading {spec.task.module}:{spec.task.function} ended its process (exit status {status})\n{tail}"
            )
            raise SpecError([Violation("task.function", problem.strip())])
        answer = reply.read_text()
    raw = json.loads(answer)
    if "message" in raw:
        raise SpecError([Violation(raw["field"], f"{raw['message']}\n{raw['traceback']}".strip())])
    return TaskDescription.from_json(answer)
