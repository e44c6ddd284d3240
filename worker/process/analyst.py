"""The Ray actor that takes part in an analysis.

What only the process itself needs is imported there: the service, which names this class, starts without PyTorch.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray

from ps.job.environment import set_variables
from worker.analysis.question import Question, Refusal

if TYPE_CHECKING:
    from ps.step.messages import Printed
    from worker.analysis.subject import Subject
    from worker.analysis.team import Work

MAX_LINES = 2000  # said and not asked for; of more, the oldest are dropped


@ray.remote(concurrency_groups={"saying": 1})  # type: ignore[call-overload]
class AnalystActor:
    """A process with the task of a question. One of them answers, and has the others work for it.

    It says what it does from a thread beside; all else runs in the process's main thread, in turn.
    """

    _subject: Subject
    _question: Question

    def __init__(self) -> None:
        from worker.process.output import Output

        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._output = Output()
        self._output.attach(self._keep)

    def describe(self) -> tuple[int, str]:
        """(pid, host name)."""
        return os.getpid(), socket.gethostname()

    def prepare(self, question: Question, code: bytes, secrets: Mapping[str, str]) -> Refusal | None:
        """Load the task. code: the bundle that it is in, or nothing. secrets: by variable."""
        import torch

        from ps.job.code import code_directory, unpack_code
        from worker.analysis.answer import refusal_of
        from worker.analysis.subject import Subject

        torch.set_num_threads(1)
        set_variables(question.spec.environment, secrets)
        self._question = question
        try:
            self._subject = Subject(question, unpack_code(code, code_directory()) if code else None)
        except Exception as error:
            return refusal_of(error)
        return None

    def _keep(self, printed: Iterable[Printed]) -> None:
        self._lines.extend(line.text for line in printed)

    @ray.method(concurrency_group="saying")
    def said(self) -> list[str]:
        """What it has done, and what the user's code has printed, since it was last asked."""
        self._output.flush(unfinished=False)
        return [self._lines.popleft() for _ in range(len(self._lines))]

    def work(self, work: Work, argument: Any, shared: Any) -> Any:
        """See worker.analysis.team.Hand; a Refusal when it cannot be done."""
        from worker.analysis.answer import refusal_of

        try:
            return work(self._subject, argument, shared)
        except Exception as error:
            return refusal_of(error)

    def answer(self, others: Sequence[Any]) -> dict[str, Any] | Refusal:
        """Answer the question. others: handles of actors that are prepared for it, too. Raises what Ray does."""
        from worker.analysis.answer import answer, refusal_of
        from worker.analysis.team import Team

        try:
            return answer(self._question, Team(self._subject, [_Hand(actor) for actor in others]), self._lines.append)
        except ray.exceptions.RayError:
            raise  # one of the others is gone
        except Exception as error:
            return refusal_of(error)


class _Hand:
    """An actor as worker.analysis.team.Hand."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def share(self, value: Any) -> Any:
        return ray.put(value)

    def begin(self, work: Work, argument: Any, shared: Any) -> Callable[[], Any]:
        from worker.analysis.team import RefusedError

        reference = self._actor.work.remote(work, argument, shared)

        def result() -> Any:
            found = ray.get(reference)
            if isinstance(found, Refusal):
                raise RefusedError(found)
            return found

        return result
