"""Every field of the job spec with its description, for help, documentation and the .proto file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

import pydantic
from pydantic import BaseModel

from steepest.errors import SpecError, Violation
from steepest.optimizer_base import OptimizerSpec
from steepest.optimizer_spec import OPTIMIZERS, ClassSpec
from steepest.spec import TaskReference, TrainingJobSpec


@dataclass(frozen=True, slots=True)
class FieldInfo:
    """One field of a spec as people read about it. default: as text, empty when there is none."""

    path: str
    description: str
    default: str


def describe_fields(model: type[BaseModel] = TrainingJobSpec, prefix: str = "") -> Iterator[FieldInfo]:
    """Every field that holds a value, in order; those of `task` are set by naming the task, and left out."""
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if name == "optimizer":
            yield from _describe_optimizers()
            continue
        parts = () if get_origin(annotation) is tuple else get_args(annotation)
        optional = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        if len(optional) == 1:
            yield from describe_fields(optional[0], f"{prefix}{name}.")
            continue
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if annotation is not TaskReference:
                yield from describe_fields(annotation, f"{prefix}{name}.")
            continue
        yield _describe(prefix + name, info)


def _describe_optimizers() -> Iterator[FieldInfo]:
    """The fields of all optimizers, each once: those that all have come first."""
    fields = dict(OptimizerSpec.model_fields)
    kinds: list[type[OptimizerSpec]] = [*OPTIMIZERS.values(), ClassSpec]
    for kind in kinds:
        fields = {**kind.model_fields, **fields}
    ordered = [*OptimizerSpec.model_fields, *(name for name in fields if name not in OptimizerSpec.model_fields)]
    for name in ordered:
        yield _describe(f"optimizer.{name}", fields[name])


def _describe(path: str, info: pydantic.fields.FieldInfo) -> FieldInfo:
    extra = info.json_schema_extra
    default = extra["default_text"] if isinstance(extra, dict) and "default_text" in extra else info.default
    text = "" if default is None or info.is_required() else str(default)
    return FieldInfo(path, info.description or "", text.lower() if isinstance(default, bool) else text)


def put_field(spec: dict[str, Any], path: str, value: Any) -> None:
    """Set a field of a spec that is not checked yet. Raises SpecError for a path through what is no table."""
    *parents, last = path.split(".")
    for name in parents:
        spec = spec.setdefault(name, {})
        if not isinstance(spec, dict):
            raise SpecError([Violation(path, f"{name} is not a table")])
    spec[last] = value
