"""Gradient checks and curvature: what is looked at is settled here, and processes on the cluster's hosts compute it."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ps.checkpoint.files import MODEL, newest_verified, verified_at
from services.jobs.access import current_caller
from services.jobs.code_bundles import CodeStore
from services.jobs.operations import Operations
from services.jobs.running import Running
from services.jobs.secret_files import SecretFiles
from services.jobs.task_probe import TaskDescription
from services.settings import Settings
from services.store.store import JobRow
from steepest.errors import ConflictError, SpecError, Violation
from steepest.spec import PlacementSpec, TrainingJobSpec, spec_from_dict
from worker.analysis.question import (
    FINITE,
    HESSIAN,
    MATRICES,
    METHODS,
    OWN,
    CheckQuestion,
    CurvatureQuestion,
    Question,
    Refusal,
)

DEFAULT_SAMPLES = 2048  # of the training data, whose mean loss is looked at
DEFAULT_TOP, MAX_TOP, MAX_PROCESSES, MAX_JACOBIAN = 5, 100, 64, 1024
DEFAULT_TOLERANCE, LEAST_TOLERANCE = 1e-6, 1e-12
ROOM_SECONDS = 60.0  # that the cluster may take to have room
SAID_SECONDS = 1.0

OnCancel = Callable[[Callable[[], None]], object]


class AnalysisRoom(Protocol):
    """See services.cluster.analysis_room."""

    def wait(self, seconds: float) -> bool:
        """Whether the room has been granted."""

    def answer(
        self, question: Question, code: bytes, secrets: Mapping[str, str]
    ) -> Iterator[str | dict[str, Any] | Refusal]:
        """What is said on the way, and at last the answer."""

    def release(self) -> None:
        """Give it back; may be called again."""


class Laboratory(Protocol):
    """Where analyses have room: the cluster."""

    def analysis_room(self, processes: int) -> AnalysisRoom:
        """Ask for room."""

    def shortage(self, placement: PlacementSpec, num_workers: int, users: Sequence[str]) -> str:
        """What it would have to wait for, or nothing."""


@dataclass(frozen=True)
class CheckRequest:
    """Which ways to a gradient to compare. Empty and 0: the default. tolerance: largest relative error that passes."""

    got: str = ""
    expected: str = ""
    tolerance: float = 0.0
    processes: int = 0

    def check(self) -> None:
        """Raises SpecError."""
        for name in ("got", "expected"):
            if getattr(self, name) not in ("", *METHODS):
                problem = f"{getattr(self, name)!r}: there is no such way to a gradient; allowed: {', '.join(METHODS)}"
                raise SpecError([Violation(name, problem)])
        if (self.got or OWN) == (self.expected or FINITE):
            raise SpecError([Violation("got", f"{self.got or OWN!r} is what is expected, too; choose two ways")])
        if self.tolerance and not LEAST_TOLERANCE <= self.tolerance <= 1.0:
            raise SpecError([Violation("tolerance", f"{self.tolerance:g}; allowed: {LEAST_TOLERANCE:g} to 1")])
        _check_processes(self.processes)


@dataclass(frozen=True)
class CurvatureRequest:
    """What to measure at a checkpoint. step: None for the newest. top, samples, processes: 0 for the default.

    matrix: one of MATRICES; nothing: the first. jacobian: for how many samples the Jacobian of the outputs is wanted, 0
    for none.
    """

    step: int | None = None
    top: int = 0
    samples: int = 0
    processes: int = 0
    matrix: str = ""
    jacobian: int = 0

    def check(self, num_samples: int) -> None:
        """Raises SpecError. num_samples: that there are."""
        most = {"top": MAX_TOP, "samples": num_samples, "jacobian": min(MAX_JACOBIAN, num_samples)}
        for name, limit in most.items():
            if not 0 <= getattr(self, name) <= limit:
                raise SpecError([Violation(name, f"{getattr(self, name)}; allowed: 1 to {limit}")])
        if self.matrix not in ("", *MATRICES):
            raise SpecError([Violation("matrix", f"{self.matrix!r}; allowed: {', '.join(MATRICES)}")])
        _check_processes(self.processes)


def _check_processes(processes: int) -> None:
    if not 0 <= processes <= MAX_PROCESSES:
        raise SpecError([Violation("processes", f"{processes}; allowed: 1 to {MAX_PROCESSES}")])


class Analyses:
    """Of a service, one at a time. Both kinds say what they do, line by line, and at last the result.

    on_cancel: called with what is to be called if nobody waits any more. Raise SpecError, ConflictError.
    """

    def __init__(
        self,
        operations: Operations,
        bundles: CodeStore,
        laboratory: Laboratory,
        running: Running,
        settings: Settings,
    ) -> None:
        self._operations = operations
        self._bundles = bundles
        self._laboratory = laboratory
        self._running = running
        self._settings = settings
        self._one = threading.Lock()

    def check_gradients(
        self, spec: TrainingJobSpec, asked: CheckRequest, on_cancel: OnCancel
    ) -> Iterator[str | dict[str, Any]]:
        """Compare two ways to the gradient of a task's first micro-batch, at its initial parameters."""
        asked.check()
        owner = current_caller().name
        spec, description, _ = self._operations.rehearse(spec, owner)
        question = CheckQuestion(
            spec,
            description.model,
            min(spec.data.micro_batch_size, description.num_samples),
            got=asked.got or OWN,
            **_known(description),
            expected=asked.expected or FINITE,
            tolerance=asked.tolerance or DEFAULT_TOLERANCE,
        )
        yield from self._answered(question, owner, asked.processes, on_cancel)

    def curvature(self, row: JobRow, asked: CurvatureRequest, on_cancel: OnCancel) -> Iterator[str | dict[str, Any]]:
        """Measure the curvature at one of a job's checkpoints."""
        spec, description = spec_from_dict(json.loads(row.spec)), TaskDescription.from_json(row.description)
        asked.check(description.num_samples)
        directory, step = self._settings.checkpoints_of(row.id), asked.step
        written = newest_verified(directory) if step is None else verified_at(directory, step)
        if written is None:
            at = "" if step is None else f" of step {step}"
            raise ConflictError(f"{row.name} has no checkpoint{at}, and curvature is measured at one")
        question = CurvatureQuestion(
            spec,
            description.model,
            asked.samples or min(description.num_samples, DEFAULT_SAMPLES),
            str(written.path / MODEL),
            top=asked.top or DEFAULT_TOP,
            **_known(description),
            matrix=asked.matrix or HESSIAN,
            jacobian=asked.jacobian,
        )
        for said in self._answered(question, row.owner, asked.processes, on_cancel):
            yield said if isinstance(said, str) else {**said, "step": written.step}

    def _answered(
        self, question: Question, owner: str, processes: int, on_cancel: OnCancel
    ) -> Iterator[str | dict[str, Any]]:
        num_leaves = math.ceil(question.num_samples / question.spec.data.micro_batch_size)
        if isinstance(question, CurvatureQuestion):
            processes = min(processes, num_leaves)  # more would have nothing to do
        processes = max(1, processes)
        secrets = SecretFiles(self._settings.secrets_directory).of(question.spec, owner)
        code = self._bundles.read(question.spec.task.code_bundle)
        if not self._one.acquire(blocking=False):
            raise ConflictError("another analysis is running on this service; try again when it is done")
        found: dict[str, Any] = {}
        try:
            room = self._laboratory.analysis_room(processes)
            try:
                if on_cancel(room.release) is False:  # whoever asked has gone meanwhile
                    return
                yield from self._until_granted(room, processes)
                for said in room.answer(question, code, secrets):
                    if isinstance(said, Refusal):
                        problem = f"{said.message}\n{said.traceback}".strip()
                        raise SpecError([Violation(said.field, problem)])
                    if isinstance(said, str):
                        yield said
                    else:
                        found = said
            finally:
                room.release()
        finally:
            self._one.release()
        yield found  # when everything is given back, for whoever asks next

    def _until_granted(self, room: AnalysisRoom, processes: int) -> Iterator[str]:
        deadline = time.monotonic() + ROOM_SECONDS
        while not room.wait(SAID_SECONDS):
            users = [controller.job_name for controller in self._running.all()]
            missing = self._laboratory.shortage(PlacementSpec(threads_per_worker=1), processes, users)
            missing = missing or f"waiting for {processes} CPUs: the cluster does not grant them"
            yield missing
            if time.monotonic() > deadline:
                raise ConflictError(f"there is no room for the analysis: {missing}; ask for fewer processes, or later")


def _known(description: TaskDescription) -> dict[str, Any]:
    """What a rehearsal found out that a question has, under its names."""
    return {name: getattr(description, name) for name in ("evaluates_with_gradients", "caches", "loss_counts")}
