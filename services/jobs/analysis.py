"""Runs an analysis of a task in a process of its own, which may take what it needs without harm to the service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ps.checkpoint.files import MODEL, newest_verified, verified_at
from ps.job.environment import hide, with_variables
from services.jobs.code_bundles import CodeStore
from services.jobs.secret_files import SecretFiles
from services.jobs.task_probe import TaskDescription
from services.settings import Settings
from services.store.store import JobRow
from steepest.errors import ConflictError, SpecError, Violation
from steepest.spec import TrainingJobSpec, spec_from_dict

DEFAULT_SAMPLES = 2048  # of the training data, whose mean loss is looked at
DEFAULT_TOP, MAX_TOP, MAX_PROCESSES, MAX_JACOBIAN = 5, 100, 64, 1024
MATRICES = ("hessian", "gauss_newton")


@dataclass(frozen=True)
class CurvatureQuestion:
    """What to measure at a checkpoint. step: None for the newest. top, samples, processes: 0 for the default.

    matrix: one of MATRICES. jacobian: for how many samples the Jacobian of the outputs is looked at, 0 for none.
    """

    step: int | None = None
    top: int = 0
    samples: int = 0
    processes: int = 0
    matrix: str = MATRICES[0]
    jacobian: int = 0

    def check(self, num_samples: int) -> None:
        """Raises SpecError. num_samples: that there are."""
        ranges = {"top": MAX_TOP, "processes": MAX_PROCESSES, "samples": num_samples}
        for name, most in {**ranges, "jacobian": min(MAX_JACOBIAN, num_samples)}.items():
            if not 0 <= getattr(self, name) <= most:
                raise SpecError([Violation(name, f"{getattr(self, name)}; allowed: 1 to {most}")])
        if self.matrix not in MATRICES:
            raise SpecError([Violation("matrix", f"{self.matrix!r}; allowed: {', '.join(MATRICES)}")])


def run_analysis(
    request: dict[str, Any],
    on_cancel: Callable[[Callable[[], None]], object] = lambda stop: None,
    secrets: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[str | dict[str, Any]]:
    """What the process says, line by line, and at last its answer. Raises SpecError for what is wrong with the task.

    on_cancel: called with what is to be called if nobody waits any more. secrets: by variable of the environment.
    """
    with tempfile.TemporaryDirectory(prefix="steepest-analysis-") as directory:
        asked, reply = Path(directory) / "request", Path(directory) / "reply"
        asked.write_text(json.dumps({**request, "path": sys.path}))
        process = subprocess.Popen(  # this interpreter, with a module of this package
            [sys.executable, "-m", "worker.analysis.run", str(asked), str(reply)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=with_variables(os.environ, request["spec"]["environment"], secrets),
        )
        on_cancel(process.kill)
        last = ""
        try:
            assert process.stdout is not None  # noqa: S101  # it is a pipe
            for line in process.stdout:
                last = hide(line.rstrip(), secrets.values())
                yield last
            process.wait()
        finally:
            process.kill()
            process.wait()
        if not reply.exists():
            problem = f"the analysis ended with exit status {process.returncode}: {last}"
            raise SpecError([Violation("task", problem)])
        found: dict[str, Any] = json.loads(reply.read_text())
    if "message" in found:
        raise SpecError([Violation(found["field"], f"{found['message']}\n{found['traceback']}".strip())])
    yield found


def question(
    kind: str, spec: TrainingJobSpec, code: Path | None, description: TaskDescription, num_samples: int, processes: int
) -> dict[str, Any]:
    """What every request has."""
    return {
        "kind": kind,
        "spec": spec.model_dump(mode="json"),
        "code": str(code or ""),
        "model": description.model.to_dict(),
        "num_samples": num_samples,
        "processes": processes,
    }


class Analyses:
    """Of the jobs of a service, one at a time."""

    def __init__(self, bundles: CodeStore, settings: Settings) -> None:
        self._bundles = bundles
        self._settings = settings
        self._one = threading.Lock()

    def curvature(
        self, row: JobRow, asked: CurvatureQuestion, on_cancel: Callable[[Callable[[], None]], object]
    ) -> Iterator[str | dict[str, Any]]:
        """Measure the curvature at one of a job's checkpoints: lines about its progress, then the result.

        on_cancel: see run_analysis. Raises SpecError, ConflictError.
        """
        spec, description = spec_from_dict(json.loads(row.spec)), TaskDescription.from_json(row.description)
        asked.check(description.num_samples)
        directory, step = self._settings.checkpoints_of(row.id), asked.step
        written = newest_verified(directory) if step is None else verified_at(directory, step)
        if written is None:
            at = "" if step is None else f" of step {step}"
            raise ConflictError(f"{row.name} has no checkpoint{at}, and curvature is measured at one")
        chosen = asked.samples or min(description.num_samples, DEFAULT_SAMPLES)
        code = self._bundles.unpacked(spec.task.code_bundle)
        request = question("curvature", spec, code, description, chosen, asked.processes or 1)
        if not self._one.acquire(blocking=False):
            raise ConflictError("another analysis is running on this service; try again when it is done")
        try:
            more = {
                "top": asked.top or DEFAULT_TOP,
                "weights": str(written.path / MODEL),
                "matrix": asked.matrix,
                "jacobian": asked.jacobian,
            }
            values = SecretFiles(self._settings.secrets_directory).of(spec, row.owner)
            for said in run_analysis({**request, **more}, on_cancel, values):
                yield said if isinstance(said, str) else {**said, "step": written.step}
        finally:
            self._one.release()
