"""The command line's options for a job, and how they become a spec."""

from __future__ import annotations

import functools
import inspect
import json
import tomllib
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from typer import Option

from steepest.errors import SpecError, Violation

_PLACE, _TRAIN, _STEP, _TASK = "Placement (never changes the result)", "Training", "Optimizer", "Task"


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """One field for each option of `train` and `submit`; what is None is left to the spec's default.

    Numbers stay text: the spec reads them, so that every refusal names field, value and what is allowed.
    """

    name: Annotated[str, Option(help="Id of the job; chosen by the service when not given.")] = ""
    workers: Annotated[
        str | None, Option(metavar="INTEGER", help="Number of workers (default: 1).", rich_help_panel=_PLACE)
    ] = None
    servers: Annotated[
        str | None,
        Option(
            metavar="INTEGER|auto",
            help="Number of servers; auto: by model size and hosts (default: auto).",
            rich_help_panel=_PLACE,
        ),
    ] = None
    threads: Annotated[
        str | None, Option(metavar="INTEGER", help="CPU threads of each worker (default: 1).", rich_help_panel=_PLACE)
    ] = None
    device: Annotated[str | None, Option(help="cpu or cuda (default: cpu).", rich_help_panel=_PLACE)] = None
    server_device: Annotated[
        str | None,
        Option(help="Of servers: cpu or cuda, on GPUs of workers (default: cpu).", rich_help_panel=_PLACE),
    ] = None
    steps: Annotated[
        str | None, Option(metavar="INTEGER", help="Length in optimizer steps.", rich_help_panel=_TRAIN)
    ] = None
    epochs: Annotated[
        str | None, Option(metavar="INTEGER", help="Length in passes over the data.", rich_help_panel=_TRAIN)
    ] = None
    seed: Annotated[
        str | None, Option(metavar="INTEGER", help="Of everything random (default: 0).", rich_help_panel=_TRAIN)
    ] = None
    global_batch: Annotated[
        str | None, Option(metavar="INTEGER", help="Samples of a step (default: 64).", rich_help_panel=_TRAIN)
    ] = None
    micro_batch: Annotated[
        str | None,
        Option(
            metavar="INTEGER",
            help="Samples of one gradient computation (default: global batch / 8).",
            rich_help_panel=_TRAIN,
        ),
    ] = None
    eval_every: Annotated[
        str | None,
        Option(
            metavar="INTEGER",
            help="Evaluate every so many steps; 0: only at the end (default: 0).",
            rich_help_panel=_TRAIN,
        ),
    ] = None
    checkpoint_every: Annotated[
        str | None,
        Option(
            metavar="INTEGER", help="Save every so many steps; 0: only at the end (default: 0).", rich_help_panel=_TRAIN
        ),
    ] = None
    optimizer: Annotated[
        str | None,
        Option(
            help="sgd, momentum, nesterov, adagrad, rmsprop, adam or adamw (default: adamw).", rich_help_panel=_STEP
        ),
    ] = None
    lr: Annotated[
        str | None,
        Option(
            metavar="FLOAT", help="Learning rate (default: 0.001; 0.01 for adagrad and rmsprop).", rich_help_panel=_STEP
        ),
    ] = None
    momentum: Annotated[
        str | None, Option(metavar="FLOAT", help="Of sgd, momentum, nesterov, rmsprop.", rich_help_panel=_STEP)
    ] = None
    weight_decay: Annotated[
        str | None, Option(metavar="FLOAT", help="torch.optim's default if not given.", rich_help_panel=_STEP)
    ] = None
    schedule: Annotated[
        str | None,
        Option(help="constant, linear, cosine, step or exponential (default: constant).", rich_help_panel=_STEP),
    ] = None
    warmup_steps: Annotated[
        str | None, Option(metavar="INTEGER", help="Steps of linear warm-up (default: 0).", rich_help_panel=_STEP)
    ] = None
    clip_norm: Annotated[
        str | None, Option(metavar="FLOAT", help="Largest global L2 norm of the gradient.", rich_help_panel=_STEP)
    ] = None
    clip_value: Annotated[
        str | None, Option(metavar="FLOAT", help="Largest gradient element.", rich_help_panel=_STEP)
    ] = None
    sync: Annotated[
        str | None, Option(help="When pushes are applied: sync (default: sync).", rich_help_panel=_STEP)
    ] = None
    staleness: Annotated[
        str | None, Option(metavar="INTEGER", help="Only for modes other than sync.", rich_help_panel=_STEP)
    ] = None
    precision: Annotated[
        str | None,
        Option(
            help="full, or bf16: forward pass under autocast, gradients in float32 (default: full).",
            rich_help_panel=_TRAIN,
        ),
    ] = None
    compression: Annotated[
        str | None,
        Option(
            help="Of gradients and updates on the network, lossy: none, bf16, fp16, topk, powersgd or twobit "
            "(default: none).",
            rich_help_panel=_STEP,
        ),
    ] = None
    arg: Annotated[
        list[str], Option(metavar="KEY=VALUE", help="Argument of the task function; repeatable.", rich_help_panel=_TASK)
    ] = field(default_factory=list)
    set: Annotated[
        list[str],
        Option(
            metavar="PATH=VALUE",
            help="Any other field, such as optimizer.betas=[0.9,0.95]; repeatable.",
            rich_help_panel=_TASK,
        ),
    ] = field(default_factory=list)


# Option -> path in the spec. An option that is not here has the path of its own name.
_PATHS = {
    "workers": "placement.workers",
    "servers": "placement.servers",
    "threads": "placement.threads_per_worker",
    "device": "placement.device",
    "server_device": "placement.server_device",
    "global_batch": "data.global_batch",
    "micro_batch": "data.micro_batch",
    "optimizer": "optimizer.name",
    "lr": "optimizer.lr",
    "momentum": "optimizer.momentum",
    "weight_decay": "optimizer.weight_decay",
    "schedule": "schedule.name",
    "warmup_steps": "schedule.warmup_steps",
    "clip_norm": "clip.norm",
    "clip_value": "clip.value",
    "sync": "sync.mode",
    "compression": "compression.name",
    "staleness": "sync.staleness",
}
_NOT_SPEC = frozenset({"name", "arg", "set"})
FLAG_OF_PATH = {
    _PATHS.get(f.name, f.name): f"--{f.name.replace('_', '-')}" for f in fields(JobOptions) if f.name not in _NOT_SPEC
} | {"training_job_id": "--name"}


def takes_job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command all options of JobOptions; it gets them as its parameter `options`."""
    hints = get_type_hints(JobOptions, include_extras=True)
    options = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[f.name],
            default=f.default if f.default is not MISSING else [],
        )
        for f in fields(JobOptions)
    ]
    own_hints = get_type_hints(command, include_extras=True)
    own = [
        p.replace(annotation=own_hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for p in inspect.signature(command).parameters.values()
        if p.name != "options"
    ]

    @functools.wraps(command)
    def wrapped(**values: Any) -> Any:
        job = JobOptions(**{f.name: values.pop(f.name) for f in fields(JobOptions)})
        return command(options=job, **values)

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
    for f in fields(JobOptions):
        value = getattr(options, f.name)
        if f.name not in _NOT_SPEC and value is not None:
            _put(spec, _PATHS.get(f.name, f.name), value)
    if options.steps is not None and options.epochs is None:
        spec.pop("epochs", None)
    if options.epochs is not None and options.steps is None:
        spec.pop("steps", None)
    for item in options.set:
        path, value = _key_value("--set", item)
        _put(spec, path, value)
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


def _put(spec: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        spec = spec.setdefault(name, {})
        if not isinstance(spec, dict):
            raise SpecError([Violation(path, f"{name} is not a table")])
    spec[last] = value


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
