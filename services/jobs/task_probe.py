"""Asks a process of its own what a submitted task is, before anything is started for it."""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ps.job.config import layout_of
from ps.job.environment import hide
from ps.parameters.description import ModelDescription
from ps.parameters.layout import Layout
from services.cluster.fork_server import ForkServer
from services.store.store import JobRow
from steepest.errors import SpecError, Violation
from steepest.spec import TrainingJobSpec, spec_from_dict

MAX_PRINTED_BYTES = 64 << 10


@dataclass(frozen=True)
class TaskDescription:
    """What the service needs to know of a task.

    evaluates_with_gradients, caches, logged_names, fingerprint, loss_counts: see JobConfig. warnings: (code, message).
    batch, weight, model_class, loss: in words. price: of the micro-batches, see Rehearsal. factors: see Plan.
    printed: by the user's code meanwhile; the end of it, and it is not stored.
    data: fields of the spec that a DataLoader settles. fan_in: of the weights of torch's own layers, how many inputs a
    unit has. activations: names of the model's activation functions. recomputed, peak_bytes: see Rehearsal. products:
    of newton_cg, which may depend on the task.
    """

    model: ModelDescription
    num_samples: int
    num_evaluation_samples: int
    metric_names: tuple[str, ...]
    evaluates_with_gradients: bool = False
    caches: tuple[str, ...] = ()
    fingerprint: tuple[tuple[str, float], ...] = ()
    warnings: tuple[tuple[str, str], ...] = ()
    batch: str = ""
    weight: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    model_class: str = ""
    loss: str = ""
    price: float = 0.0
    factors: tuple[float, ...] = ()
    logged_names: tuple[str, ...] = ()
    fan_in: dict[str, int] = field(default_factory=dict)
    activations: tuple[str, ...] = ()
    loss_counts: str = ""
    recomputed: str = ""
    peak_bytes: int = 0
    products: str = ""
    printed: str = ""

    @property
    def known(self) -> dict[str, Any]:
        """What a JobConfig has of the task, under its names."""
        names = (
            "model", "num_samples", "num_evaluation_samples", "metric_names", "evaluates_with_gradients", "caches",
            "logged_names", "fingerprint", "factors", "loss_counts",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def completed(self, spec: TrainingJobSpec) -> TrainingJobSpec:
        """The spec with what the task settles."""
        update: dict[str, Any] = {}
        if self.data:
            update["data"] = spec.data.model_copy(update=self.data)
        if self.recomputed:
            update["memory"] = spec.memory.model_copy(update={"checkpoint_activations": self.recomputed})
        if self.products:
            update["optimizer"] = spec.optimizer.model_copy(update={"products": self.products})
        return spec.model_copy(update=update)

    def layout(self, spec: TrainingJobSpec) -> Layout:
        """How the parameters of the job lie."""
        return layout_of(self.model, spec)

    def to_json(self) -> str:
        """A form that the store can keep."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "printed"}
        return json.dumps({**own, "model": self.model.to_dict()})

    @staticmethod
    @functools.lru_cache(maxsize=16)  # it takes 0.1 s of a model with 10,000 parameters, and a page asks often
    def from_json(text: str) -> TaskDescription:
        """The inverse of `to_json`; what it returns is not to be written to."""
        raw = json.loads(text)
        return TaskDescription(
            ModelDescription.from_dict(raw["model"]),
            raw["num_samples"],
            raw["num_evaluation_samples"],
            tuple(raw["metric_names"]),
            raw.get("evaluates_with_gradients", False),
            tuple(raw.get("caches", ())),
            tuple((name, value) for name, value in raw.get("fingerprint", ())),
            tuple((code, message) for code, message in raw.get("warnings", ())),
            raw.get("batch", ""),
            raw.get("weight", ""),
            raw.get("data", {}),
            raw.get("model_class", ""),
            raw.get("loss", ""),
            raw.get("price", 0.0),
            tuple(raw.get("factors", ())),
            tuple(raw.get("logged_names", ())),
            raw.get("fan_in", {}),
            tuple(raw.get("activations", ())),
            raw.get("loss_counts", ""),
            raw.get("recomputed", ""),
            raw.get("peak_bytes", 0),
            raw.get("products", ""),
        )


def parameter_names(row: JobRow) -> list[str]:
    """Those of a job's parameters, in the order of its layout."""
    return _parameter_names(row.description, row.spec)


@functools.lru_cache(maxsize=16)
def _parameter_names(description: str, spec: str) -> list[str]:
    layout = TaskDescription.from_json(description).layout(spec_from_dict(json.loads(spec)))
    return [p.name for p in layout.parameters]


class TaskProbe:
    """Describes tasks, each in a fork of a process that has imported PyTorch."""

    def __init__(self, forks: ForkServer) -> None:
        self._forks = forks

    def describe(
        self, spec: TrainingJobSpec, code: Path | None, timeout_seconds: float, secrets: Mapping[str, str] | None = None
    ) -> TaskDescription:
        """Load the task and describe it. secrets: by variable, which the code finds in its environment.

        Raises SpecError, with the traceback of the user's code if that raised.
        """
        name = f"{spec.task.module}:{spec.task.function}"
        with tempfile.TemporaryDirectory(prefix="steepest-probe-") as directory:
            request, reply, output = (Path(directory) / name for name in ("request", "reply", "output"))
            request.write_text(
                json.dumps(
                    {
                        "spec": spec.model_dump(mode="json"),
                        "set": sorted(spec.data.model_fields_set),
                        "code": str(code or ""),
                        "path": sys.path,
                        "secrets": secrets or {},
                    }
                )
            )
            try:
                with output.open("wb") as said, Path(os.devnull).open("rb") as nothing:
                    streams = (nothing.fileno(), said.fileno(), said.fileno())
                    command = ["-m", "worker.rehearsal.probe", str(request), str(reply)]
                    status = self._forks.run(command, streams, timeout_seconds)
            except TimeoutError:
                problem = f"{name} did not return within {timeout_seconds:g} s"
                raise SpecError([Violation("task.function", problem)]) from None
            shown = hide(output.read_bytes().decode(errors="replace"), (secrets or {}).values()).encode()
            if not reply.exists():
                tail = shown[-2000:].decode(errors="replace").strip()
                problem = f"loading {name} ended its process ({_ending(status)})\n{tail}"
                raise SpecError([Violation("task.function", problem.strip())])
            answer = reply.read_text()
            printed = shown[-MAX_PRINTED_BYTES:].decode(errors="replace")
        raw = json.loads(answer)
        if "message" in raw:
            raise SpecError([Violation(raw["field"], f"{raw['message']}\n{raw['traceback']}".strip())])
        return replace(TaskDescription.from_json(answer), printed=printed)


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"exit status {code}"
