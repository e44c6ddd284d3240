"""What a job's user code printed: a file of JSON lines beside its checkpoints, which outlives the job."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ps.step.messages import Printed

log = logging.getLogger(__name__)

READ_BYTES = 1 << 20


class StoredLine(NamedTuple):
    """A line and where the next one begins."""

    line: Printed
    offset: int


class JobLog:
    """The log of one job. max_bytes: after which lines are left out."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._lock = threading.Lock()

    def append(self, lines: Iterable[Printed]) -> None:
        """Add lines. Those beyond the limit are left out, and the last line says so; so are those of a full disk."""
        try:
            with self._lock:
                self._append(lines)
        except OSError as error:  # which must not end the job
            log.warning("what user code printed cannot be kept: %s", error)

    def _append(self, lines: Iterable[Printed]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            for line in lines:
                if file.tell() > self._max_bytes:
                    return
                file.write(_to_bytes(line))
                if file.tell() > self._max_bytes:
                    full = f"(the log is full: {self._max_bytes} bytes; what is printed from here on is left out)"
                    file.write(_to_bytes(line._replace(stream="stderr", text=full)))

    def read(self, offset: int) -> list[StoredLine]:
        """Some lines from `offset` on, which is 0 or that of a line; none at the end."""
        try:
            with self._path.open("rb") as file:
                file.seek(offset)
                data = file.read(READ_BYTES)
        except FileNotFoundError:
            return []
        found = []
        for raw in data.splitlines(keepends=True):
            if not raw.endswith(b"\n"):
                break  # it is being written, or goes on in the next piece
            offset += len(raw)
            try:
                found.append(StoredLine(Printed(*json.loads(raw)), offset))
            except (ValueError, TypeError):  # a disk that was full, or an offset from elsewhere
                continue
        return found


def _to_bytes(line: Printed) -> bytes:
    return json.dumps(line).encode() + b"\n"
