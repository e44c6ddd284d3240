"""The command line's options for a job, and how they become a spec."""

from __future__ import annotations

import functools
import inspect
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from typer import Option

from steepest.errors import SpecError, Violation
from steepest.spec_fields import describe_fields, put_field

_PLACE, _TRAIN, _STEP, _TASK = (
    "Placement (how many workers and servers never changes the result)",
    "Training",
    "Optimizer",
    "Task",
)


_INT, _FLOAT = "INTEGER", "FLOAT"
# Option -> (path in the spec, panel of the help, metavar). Help and default are those of the spec's field.
_OPTIONS: dict[str, tuple[str, str, str | None]] = {
    "workers": ("placement.workers", _PLACE, _INT),
    "servers": ("placement.servers", _PLACE, "INTEGER|auto"),
    "threads": ("placement.threads_per_worker", _PLACE, _INT),
    "device": ("placement.device", _PLACE, None),
    "server_device": ("placement.server_device", _PLACE, None),
    "steps": ("steps", _TRAIN, _INT),
    "epochs": ("epochs", _TRAIN, _INT),
    "seed": ("seed", _TRAIN, _INT),
    "global_batch": ("data.global_batch", _TRAIN, _INT),
    "micro_batch": ("data.micro_batch", _TRAIN, _INT),
    "accumulate": ("data.accumulate", _TRAIN, _INT),
    "init_from": ("init_from", _TRAIN, "FILE|JOB"),
    "eval_every": ("eval_every", _TRAIN, _INT),
    "patience": ("best.patience", _TRAIN, _INT),
    "checkpoint_every": ("checkpoint_every", _TRAIN, _INT),
    "precision": ("precision", _TRAIN, None),
    "optimizer": ("optimizer.name", _STEP, None),
    "lr": ("optimizer.lr", _STEP, _FLOAT),
    "momentum": ("optimizer.momentum", _STEP, _FLOAT),
    "weight_decay": ("optimizer.weight_decay", _STEP, _FLOAT),
    "schedule": ("schedule.name", _STEP, None),
    "warmup_steps": ("schedule.warmup_steps", _STEP, _INT),
    "clip_norm": ("clip.norm", _STEP, _FLOAT),
    "clip_value": ("clip.value", _STEP, _FLOAT),
    "sync": ("sync.mode", _STEP, None),
    "staleness": ("sync.staleness", _STEP, _INT),
    "compression": ("compression.name", _STEP, None),
}
FLAG_OF_PATH = {path: f"--{name.replace('_', '-')}" for name, (path, _, _) in _OPTIONS.items()} | {
    "training_job_id": "--name"
}


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What a user typed of a job. spec: values by path; all are text, which the spec reads, so that every refusal
    names field, value and what is allowed.
    """

    name: str = ""
    label: Sequence[str] = ()
    env: Sequence[str] = ()
    secret: Sequence[str] = ()
    requirement: Sequence[str] = ()
    arg: Sequence[str] = ()
    set: Sequence[str] = ()
    spec: Mapping[str, str] = field(default_factory=dict)


def _parameters() -> list[inspect.Parameter]:
    """All options of a job as Typer takes them."""
    described = {info.path: info for info in describe_fields()}
    options: dict[str, tuple[Any, Any]] = {
        "name": (
            Annotated[
                str,
                Option(help="Id of the job; of a sweep, whose trials are NAME-0 and so on."),
            ],
            "",
        )
    }
    for name, (path, panel, metavar) in _OPTIONS.items():
        info = described[path]
        default = f" (default: {info.default})" if info.default else ""
        text = f"{info.description.removesuffix('.')}{default}."
        options[name] = (Annotated[str | None, Option(help=text, metavar=metavar, rich_help_panel=panel)], None)
    argument = Option(metavar="KEY=VALUE", help="Argument of the task function; repeatable.", rich_help_panel=_TASK)
    any_field = Option(
        metavar="PATH=VALUE",
        help="Any other field, such as optimizer.betas=[0.9,0.95]; repeatable.",
        rich_help_panel=_TASK,
    )
    label = Option(metavar="KEY=VALUE", help="Label to find the job by, as team=vision; repeatable.")
    options["label"] = (Annotated[list[str], label], [])
    options["arg"] = (Annotated[list[str], argument], [])
    variable = Option(
        metavar="NAME=VALUE", help="Environment variable of the task's code; repeatable.", rich_help_panel=_TASK
    )
    secret = Option(
        metavar="NAME=SECRET",
        help="Environment variable that holds a secret of the service; repeatable.",
        rich_help_panel=_TASK,
    )
    requirement = Option(
        metavar="PACKAGE",
        help="Package that the code needs and the service may not have, as einops>=0.8; repeatable.",
        rich_help_panel=_TASK,
    )
    options["requirement"] = (Annotated[list[str], requirement], [])
    options["env"] = (Annotated[list[str], variable], [])
    options["secret"] = (Annotated[list[str], secret], [])
    options["set"] = (Annotated[list[str], any_field], [])
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        for name, (annotation, default) in options.items()
    ]


def takes_job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command all options of a job; it gets them as its parameter `options`."""
    options = _parameters()
    own_hints = get_type_hints(command, include_extras=True)
    own = [
        p.replace(annotation=own_hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for p in inspect.signature(command).parameters.values()
        if p.name != "options"
    ]

    @functools.wraps(command)
    def wrapped(**values: Any) -> Any:
        texts = {key: values.pop(key) for key in ("name", "label", "env", "secret", "requirement", "arg", "set")}
        given = {path: values.pop(key) for key, (path, _, _) in _OPTIONS.items()}
        spec = {path: value for path, value in given.items() if value is not None}
        return command(options=JobOptions(**texts, spec=spec), **values)

    wrapped.__signature__ = inspect.Signature([own[0], *options, *own[1:]])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in [*own, *options]}
    del wrapped.__wrapped__
    return wrapped


@dataclass(frozen=True, slots=True)
class Submission:
    """What `Client.submit` takes."""

    task: str
    name: str
    arguments: dict[str, Any]
    spec: dict[str, Any]


def submission(task: str, options: JobOptions) -> Submission:
    """Combine TASK (or a job file) with the options, which win. Raises SpecError."""
    spec: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    if task.endswith(".toml"):
        spec = _read_job_file(Path(task))
        task = _task_of(spec, Path(task), arguments)
    for path, value in options.spec.items():
        put_field(spec, path, value)
    if "steps" in options.spec and "epochs" not in options.spec:
        spec.pop("epochs", None)
    if "epochs" in options.spec and "steps" not in options.spec:
        spec.pop("steps", None)
    for item in options.set:
        path, value = _key_value("--set", item)
        put_field(spec, path, value)
    for flag, field_, items in (
        ("--label", "labels", options.label),
        ("--env", "environment", options.env),
        ("--secret", "secrets", options.secret),
    ):
        for item in items:
            key, equals, value = item.partition("=")
            if not equals:
                raise SpecError([Violation(flag, f"{item!r} is not of the form KEY=VALUE")])
            spec[field_] = {**spec.get(field_, {}), key: value}
    if options.requirement:
        spec["requirements"] = [*spec.get("requirements", []), *options.requirement]
    arguments.update(_key_value("--arg", item) for item in options.arg)
    name = spec.pop("name", "")
    return Submission(task, options.name or name, arguments, spec)


def _read_job_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise SpecError([Violation("task", f"there is no file {path} to read: {error.strerror}")]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError([Violation("task", f"{path} is no TOML file: {error}")]) from None


def _task_of(spec: dict[str, Any], path: Path, arguments: dict[str, Any]) -> str:
    """Take `task` out of a job file: a string, or a table of `function` and `arguments`. Paths count from there."""
    task = spec.pop("task", None)
    if isinstance(task, dict):
        arguments.update(task.get("arguments", {}))
        task = task.get("function")
    if not isinstance(task, str):
        problem = f'{path} has no task; it needs a line such as: task = "train.py:digits"'
        raise SpecError([Violation("task", problem)])
    where, _, function = task.rpartition(":")
    return f"{path.parent / where}:{function}" if where.endswith(".py") else task


def _key_value(flag: str, item: str) -> tuple[str, Any]:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise SpecError([Violation(flag, f"{item!r} is not of the form {'PATH' if flag == '--set' else 'KEY'}=VALUE")])
    try:
        return key, json.loads(text)
    except json.JSONDecodeError:
        return key, text


def explain(error: SpecError) -> str:
    """The violations, one a line, with the flag beside the field it sets."""
    lines = []
    for violation in error.violations:
        flag = FLAG_OF_PATH.get(violation.field)
        lines.append(f"{flag} ({violation.field}): {violation.problem}" if flag else str(violation))
    return "\n".join(lines)
