"""What is wrong with a spec, in words for the one who wrote it."""

from __future__ import annotations

from typing import Any, get_args, get_origin

from pydantic import BaseModel

from steepest.errors import Violation
from steepest.optimizer_spec import CLASS, OPTIMIZER_NAMES, OPTIMIZERS, ClassSpec


def violation(error: dict[str, Any], root: type[BaseModel]) -> Violation:
    """One of pydantic's errors, in words that name the field and what is allowed. root: the spec's class."""
    loc, kind = [str(part) for part in error["loc"]], error["type"]
    optimizer = None
    if loc[:1] == ["optimizer"] and len(loc) > 1 and loc[1] in (*OPTIMIZERS, CLASS):  # pydantic puts it into the path
        optimizer = OPTIMIZERS.get(loc.pop(1), ClassSpec)
    path = ".".join(loc)
    match kind:
        case "value_error":  # from a validator of ours, whose message is complete
            return Violation(path or "spec", str(error["ctx"]["error"]))
        case "union_tag_invalid":
            allowed = ", ".join(OPTIMIZER_NAMES)
            problem = f"{error['ctx']['tag']!r} is not an optimizer; allowed: {allowed}, or a class as module:Class"
            return Violation("optimizer.name", problem)
        case "string_pattern_mismatch" if optimizer is ClassSpec:
            problem = f"{error['input']!r} names no class; allowed: package.module:Class, as Python imports it"
            return Violation("optimizer.name", problem)
        case "extra_forbidden" if optimizer is not None:
            own = ", ".join(name for name in optimizer.model_fields if name != "name")
            name = "a class's optimizer" if optimizer is ClassSpec else optimizer.model_fields["name"].default
            own += "; what else the class takes goes into options" if optimizer is ClassSpec else ""
            return Violation(path, f"no such field of {name}; allowed: {own}")
        case "extra_forbidden":
            parent = _model_at(root, loc[:-1])
            meant = _homes(root, loc[-1]) if parent is root else []
            hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
            return Violation(path, f"no such field{hint}; allowed: {', '.join(parent.model_fields)}")
        case "model_type":
            fields = ", ".join(_model_at(root, loc).model_fields)
            return Violation(path, f"{error['input']!r} is no table of fields; it takes {fields}")
        case "missing":
            return Violation(path, "is required")
    message = error["msg"].replace("Input should be", "must be")
    return Violation(path, f"{error['input']!r} {message[:1].lower()}{message[1:]}")


def _model_at(root: type[BaseModel], loc: list[str]) -> type[BaseModel]:
    """The class of the part of the spec at a path."""
    parent = root
    for part in loc:
        if part.isdigit():  # of a list
            continue
        annotation = parent.model_fields[part].annotation
        if get_origin(annotation) is tuple:
            annotation = next(iter(get_args(annotation)), None)
        own = [each for each in (annotation, *get_args(annotation)) if isinstance(each, type)]
        parent = next((each for each in own if issubclass(each, BaseModel)), parent)
    return parent


def _homes(root: type[BaseModel], name: str) -> list[str]:
    """Paths of fields of this name in the parts of the spec."""
    found = ["optimizer"] if any(name in optimizer.model_fields for optimizer in OPTIMIZERS.values()) else []
    for part, field in root.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += [part] if name in field.annotation.model_fields else []
    return [f"{part}.{name}" for part in found]
