"""A job as it is after its submission: described and rehearsed, in this process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.local_job import job_config
from ps.job.config import JobConfig
from services.jobs.task_probe import TaskDescription
from steepest.spec import TrainingJobSpec, spec_from_dict
from worker.rehearsal.probe import probe


class RefusedError(Exception):
    """The task was refused. field: of the spec."""

    def __init__(self, field: str, message: str, traceback: str) -> None:
        self.field = field
        self.traceback = traceback
        super().__init__(message)


def spec_of(task: str, **raw: Any) -> TrainingJobSpec:
    """The spec of a job of a task, "module:function"."""
    module, function = task.split(":")
    reference = {"module": module, "function": function, "arguments": raw.pop("arguments", {})}
    return spec_from_dict({**raw, "task": reference})


def rehearsed(task: str, **raw: Any) -> TaskDescription:
    """What is found out about a task. Raises RefusedError."""
    spec = spec_of(task, **raw)
    answer = probe(
        {"spec": spec.model_dump(mode="json"), "set": sorted(spec.data.model_fields_set), "code": "", "path": []}
    )
    if "message" in answer:
        raise RefusedError(answer["field"], answer["message"], answer["traceback"])
    return TaskDescription.from_json(json.dumps(answer))


def submitted(directory: Path, task: str, **raw: Any) -> JobConfig:
    """The config of the job's processes. Raises RefusedError."""
    found = rehearsed(task, **dict(raw))
    config = job_config(directory, task, **raw)
    return replace(
        config,
        spec=found.completed(config.spec),
        **found.known,
    )
