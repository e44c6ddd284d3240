"""Between the job spec, the step record and the wire. Only converters touch *_pb2."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf.json_format import ParseDict

from steepest.change_spec import ChangeSpec
from steepest.errors import SpecError, Violation
from steepest.spec import TrainingJobSpec, spec_from_dict
from steepest.v1 import training_jobs_pb2 as pb


def spec_to_proto(spec: TrainingJobSpec) -> pb.TrainingJobSpec:
    """TrainingJobSpec, to the wire. What is None, or was not set, stays absent."""
    raw = spec.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    arguments = raw["task"].pop("arguments", {})
    raw["task"]["arguments"] = {key: json.dumps(value) for key, value in arguments.items()}
    if "options" in raw.get("optimizer", {}):
        options = raw["optimizer"]["options"]
        raw["optimizer"]["options"] = {key: json.dumps(value) for key, value in options.items()}
    return ParseDict(raw, pb.TrainingJobSpec())


def spec_from_proto(message: pb.TrainingJobSpec) -> TrainingJobSpec:
    """TrainingJobSpec, from the wire; what is absent takes its default.

    Raises SpecError with one violation for every bad field.
    """
    return spec_from_dict(_present(message))


def change_to_proto(change: ChangeSpec) -> pb.ChangeSpec:
    """What is done otherwise from a step on, to the wire."""
    return pb.ChangeSpec(**change.model_dump())


def change_from_proto(message: pb.ChangeSpec) -> ChangeSpec:
    """What is done otherwise from a step on, from the wire."""
    return ChangeSpec.model_validate(_present(message))


def _json(field: str, text: str) -> Any:
    """Raises SpecError for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise SpecError([Violation(field, f"{shown!r} is no JSON: {error}")]) from None


def _present(message: Any) -> dict[str, Any]:
    """The fields that a sender has set. Every scalar of a spec has presence, so that 0 and absent differ."""
    raw: dict[str, Any] = {}
    for descriptor, value in message.ListFields():
        if descriptor.name in ("arguments", "options"):
            where = "task.arguments" if descriptor.name == "arguments" else "optimizer.options"
            raw[descriptor.name] = {key: _json(f"{where}.{key}", text) for key, text in value.items()}
        elif descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
            raw[descriptor.name] = dict(value)
        elif descriptor.message_type is not None and descriptor.is_repeated:
            raw[descriptor.name] = [_present(each) for each in value]
        elif descriptor.message_type is not None:
            raw[descriptor.name] = _present(value)
        else:
            raw[descriptor.name] = list(value) if descriptor.is_repeated else value
    return raw
