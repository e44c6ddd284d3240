"""Finds the user's function, calls it, and describes the task it returns."""

from __future__ import annotations

import importlib
import inspect
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from ps.job.code import put_first
from ps.job.environment import hidden
from steepest.spec import TaskReference
from steepest.task import AnalyticTask, Task
from worker.data.loader import DataError, LoaderData
from worker.data.randomness import seed_python


class TaskError(Exception):
    """The task cannot be used. field: of the spec; traceback: of the user's code, if it raised."""

    def __init__(self, field: str, message: str, user_traceback: str = "") -> None:
        self.field = field
        self.message = message
        self.traceback = user_traceback
        super().__init__(message)


def user_traceback(error: BaseException) -> str:
    """The traceback without the frames of this package that lead to the user's code."""
    frames = error.__traceback__
    own = (Path(__file__).parent.parent, Path(importlib.__file__).parent)
    while frames is not None and any(Path(frames.tb_frame.f_code.co_filename).is_relative_to(p) for p in own):
        frames = frames.tb_next
    shown = traceback.TracebackException(type(error), error, frames or error.__traceback__)
    _leave_out_ours(error, shown)
    return hidden("".join(shown.format()).rstrip())


def _leave_out_ours(error: BaseException, shown: traceback.TracebackException) -> None:
    """Cut the chain of exceptions where it comes to one of this package, which says nothing to a user."""
    while True:
        before = error.__cause__ or error.__context__
        if before is None:
            return
        if type(before).__module__.startswith(f"{__package__.partition('.')[0]}."):
            shown.__cause__ = shown.__context__ = None
            return
        following = shown.__cause__ or shown.__context__
        if following is None:
            return
        error, shown = before, following


def load_task(reference: TaskReference, code: Path | None, seed: int) -> Task | AnalyticTask:
    """Import the user's module and call its function right after `torch.manual_seed(seed)`.

    NumPy's and Python's own generators are seeded, too, and all of them before the import. A module of the user's hides
    an installed one of the same name, as it does in a script. code: where the code bundle is unpacked.

    Raises TaskError.
    """
    if code is not None:
        put_first(code)
    seed_python(seed)
    torch.manual_seed(seed)
    name = f"{reference.module}:{reference.function}"
    try:
        module = importlib.import_module(reference.module)
    except ModuleNotFoundError as error:
        if error.name == reference.module.split(".")[0]:
            raise TaskError("task.module", f"there is no module {reference.module!r}") from error
        missing = f"importing {reference.module} needs the module {error.name!r}, which is not there"
        raise TaskError("task.module", missing, user_traceback(error)) from error
    except BaseException as error:
        raised = f"importing {reference.module} raised {said(error)}{_cure(error)}"
        raise TaskError("task.module", raised, user_traceback(error)) from error
    function = getattr(module, reference.function, None)
    if not callable(function):
        there = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        raise TaskError(
            "task.function",
            f"{reference.module} has no function {reference.function!r}; it has: {', '.join(there) or 'none'}",
        )
    _check_arguments(function, reference)
    seed_python(seed)
    torch.manual_seed(seed)
    try:
        task = function(**reference.arguments)
    except BaseException as error:
        raised = f"{name} raised {said(error)}{_cure(error)}"
        raise TaskError("task.function", raised, user_traceback(error)) from error
    if not isinstance(task, Task | AnalyticTask):
        raise TaskError(
            "task.function", f"{name} returned {type(task).__name__}; it must return a steepest.Task (or AnalyticTask)"
        )
    return _taken_apart(task)


def initialize(task: Task | AnalyticTask, path: str, *, strict: bool) -> None:
    """Load weights into the task's model, from a safetensors or a state_dict file. Raises TaskError."""
    if not path:
        return
    if isinstance(task, AnalyticTask):
        raise TaskError("init_from", "an AnalyticTask has no state_dict; have its function read the values")
    try:
        if path.endswith(".safetensors"):
            weights: Any = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        problems = task.model.load_state_dict(weights, strict=False)
    except Exception as error:  # what torch and safetensors raise of a file has many types
        raise TaskError("init_from", f"{path!r} cannot be loaded: {said(error)}") from error
    if strict and (problems.missing_keys or problems.unexpected_keys):
        parts = [("has nothing for", problems.missing_keys), ("has what the model has not,", problems.unexpected_keys)]
        found = " and ".join(f"{what} {', '.join(keys[:3])}" for what, keys in parts if keys)
        raise TaskError("init_from", f"{path!r} {found}; init_strict = false takes what fits")
    if len(problems.missing_keys) == len(task.model.state_dict()):
        raise TaskError("init_from", f"nothing in {path!r} has a name of the model's")


def _taken_apart(task: Task | AnalyticTask) -> Task | AnalyticTask:
    """The task with what is in its DataLoaders."""
    if isinstance(task, AnalyticTask):
        return task
    return replace(
        task,
        train_data=_out_of_loader(task.train_data, "train_data"),
        eval_data=_out_of_loader(task.eval_data, "eval_data"),
    )


def _out_of_loader(data: Any, name: str) -> Any:
    try:
        return LoaderData(data) if isinstance(data, DataLoader) else data
    except DataError as error:
        raise TaskError(f"task.{name}", f"{name}: {error}") from error


def said(error: BaseException) -> str:
    """An exception in one line: type and message, without secrets."""
    text = hidden(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _cure(error: BaseException) -> str:
    """What to do about an error, where that is known."""
    if isinstance(error, FileNotFoundError) and not Path(str(error.filename or "/")).is_absolute():
        return (
            ". A relative path counts from where the process runs: a file that goes along with the task is at "
            f"Path(__file__).parent / {str(error.filename)!r}"
        )
    return ""


def _check_arguments(function: Any, reference: TaskReference) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    parameters = signature.parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    for key in reference.arguments:
        if key not in named and not takes_any:
            raise TaskError(
                f"task.arguments.{key}",
                f"{reference.function} takes no argument {key!r}; it takes: {', '.join(named) or 'none'}",
            )
    for p in parameters:
        if p.name in named and p.default is p.empty and p.name not in reference.arguments:
            raise TaskError(f"task.arguments.{p.name}", f"{reference.function} needs the argument {p.name!r}")
