"""The `steepest` command in this process: what it prints and how it exits, without the start of an interpreter."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from steepest.cli import main


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str, directory: Path | None = None) -> Ran:
    """Run the command as a user types it, in `directory`."""
    stdout, stderr = io.StringIO(), io.StringIO()
    code: object = 0
    terminated = signal.getsignal(signal.SIGTERM)
    with (
        mock.patch.object(sys, "argv", ["steepest", *arguments]),
        contextlib.chdir(directory or Path.cwd()),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, terminated)
    assert code is None or isinstance(code, int)
    return Ran(code or 0, stdout.getvalue(), stderr.getvalue())
