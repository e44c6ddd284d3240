"""What a client can tell of a submission by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steepest.bundle import MAX_DATA_BYTES, Bundle, bundle_task
from steepest.errors import SpecError, Violation
from steepest.spec import TrainingJobSpec, spec_from_dict


def check_submission(
    task: str, arguments: Mapping[str, Any], spec: Mapping[str, Any]
) -> tuple[Bundle, TrainingJobSpec]:
    """All that can be told of a submission without a service. Raises SpecError."""
    if not isinstance(task, str):
        problem = f"{task!r} is no text; name the function as 'path/to/file.py:function' or 'package.module:function'"
        raise SpecError([Violation("task", problem)])
    optimizer = spec.get("optimizer")
    name = str(optimizer.get("name", "")) if isinstance(optimizer, Mapping) else ""
    bundle = bundle_task(task, also=name.partition(":")[0] if ":" in name else "")
    reference = {"module": bundle.module, "function": bundle.function, "arguments": dict(arguments)}
    checked = spec_from_dict({**spec, "task": reference})
    if checked.init_from and Path(checked.init_from).is_file():
        checked = checked.model_copy(update={"init_from": str(Path(checked.init_from).resolve())})
    return bundle, checked


def left_out(bundle: Bundle) -> list[str]:
    """A sentence for each file or folder that the task's code names and that does not go along."""
    return [
        f"{name} is named in the task and not sent along, for files beside a task go with it up to "
        f"{MAX_DATA_BYTES >> 20} MiB in all: put it where every host finds it, and give the task its full path"
        for name in bundle.left_out
    ]
