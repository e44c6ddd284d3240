"""Teams whose other members are in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from worker.analysis.question import Question
from worker.analysis.subject import Subject
from worker.analysis.team import Team, Work


def local_team(question: Question, size: int = 1) -> Team:
    """Of so many subjects."""
    return Team(Subject(question), [_Beside(Subject(question)) for _ in range(size - 1)])


class _Beside:
    """As another process: what comes from it, or goes to it, cannot be written to."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def share(self, value: Any) -> Any:
        return _frozen(value)

    def begin(self, work: Work, argument: Any, shared: Any) -> Callable[[], Any]:
        found = _frozen(work(self._subject, argument, shared))
        return lambda: found


def _frozen(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = value.copy()
        value.flags.writeable = False
    elif isinstance(value, (list, tuple)):
        return type(value)(*map(_frozen, value)) if hasattr(value, "_fields") else type(value)(map(_frozen, value))
    return value
