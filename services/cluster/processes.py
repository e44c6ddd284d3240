"""What is known of the processes of a job: where one runs, and how it ended. Free of Ray."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Started:
    """A process runs."""

    pid: int
    host: str


class ExitKind(StrEnum):
    """How a process of a job ended."""

    DONE = "done"  # dismissed in good order
    REFUSED = "refused"  # the task cannot be loaded there, or the GPU cannot be used: trying again would not help
    DIED = "died"


@dataclass(frozen=True, slots=True)
class Exit:
    """A process has ended. message: what happened, as a clause that follows the process's name."""

    kind: ExitKind
    message: str = ""
    traceback: str = ""


def explain_status(status: int | None) -> str:
    """Describe a wait status (`os.waitpid`) as a clause; None: the status is unknown."""
    if status is None:
        return "ended without saying why: it was killed, ran out of memory, or its host is gone"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            return f"was killed by signal {number} ({signal.Signals(number).name})"
        except ValueError:
            return f"was killed by signal {number}"
    return f"exited with status {os.WEXITSTATUS(status)}"


def named(name: str, started: Started | None) -> str:
    """A process as messages call it: "worker-0 (pid 3658 on node-a)"."""
    return name if started is None or not started.pid else f"{name} (pid {started.pid} on {started.host})"
