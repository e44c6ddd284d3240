"""What user code prints in a worker: kept line by line, and sent to the leader a few times a second."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from ps.job.environment import hidden
from ps.step.messages import Printed

FLUSH_SECONDS = 0.25
MAX_HELD = 2000  # lines; beyond that the oldest are dropped, and their number is said
MAX_LINE = 4096  # characters


class Output:
    """The standard streams of this process from now on: whole lines go where they went, and are kept.

    What was printed before `attach` waits for it.
    """

    def __init__(self) -> None:
        self._lines: deque[Printed] = deque()
        self._dropped = 0
        self._lock = threading.Lock()
        self._send: Callable[[list[Printed]], None] | None = None
        self._ended = threading.Event()
        self._before = sys.stdout, sys.stderr
        sys.stdout = _Tee(sys.stdout, lambda text: self._take("stdout", text))
        sys.stderr = _Tee(sys.stderr, lambda text: self._take("stderr", text))

    def attach(self, send: Callable[[list[Printed]], None]) -> None:
        """Give lines to `send` from now on, from a thread of this object's own."""
        self._send = send
        threading.Thread(target=self._flush_often, daemon=True).start()

    def flush(self, *, unfinished: bool = True) -> None:
        """Send what has been printed so far. unfinished: also a line that has no end yet."""
        for stream in (sys.stdout, sys.stderr):
            if unfinished and isinstance(stream, _Tee):
                stream.finish_line()
        if self._lines:
            self._flush()

    def _take(self, stream: str, text: str) -> None:
        with self._lock:
            self._lines.append(Printed(time.time(), stream, text[:MAX_LINE]))
            if len(self._lines) > MAX_HELD:
                self._lines.popleft()
                self._dropped += 1

    def _flush_often(self) -> None:
        while not self._ended.wait(FLUSH_SECONDS):
            self.flush(unfinished=False)

    def close(self) -> None:
        """Leave the streams as they were; the process may have another worker."""
        self._ended.set()
        sys.stdout, sys.stderr = self._before
        self._send = None

    def _flush(self) -> None:
        if self._send is None:
            return
        with self._lock:
            lines, dropped = list(self._lines), self._dropped
            self._lines.clear()
            self._dropped = 0
        if dropped:
            note = f"({dropped} lines were printed too fast and are left out)"
            lines.insert(0, Printed(lines[0].time, "stderr", note))
        if lines:
            self._send(lines)


def _as_shown(line: str) -> str:
    """What a terminal shows of a line that a progress bar wrote again and again."""
    return line.rstrip("\r").rpartition("\r")[2]


class _Tee:
    """A text stream that also gives whole lines to `take`."""

    def __init__(self, stream: TextIO, take: Callable[[str], None]) -> None:
        self._stream = stream
        self._take = take
        self._rest = ""

    def write(self, text: str) -> int:
        """Write, and keep."""
        *lines, rest = (self._rest + text).split("\n")
        for line in lines:
            self._pass_on(line, "\n")
        self._rest = rest[-MAX_LINE:] if "\r" in rest else rest[:MAX_LINE]
        return len(text)

    def finish_line(self) -> None:
        """Give what has no end of line yet."""
        rest, self._rest = self._rest, ""
        if rest:
            self._pass_on(rest)

    def _pass_on(self, line: str, end: str = "") -> None:
        """A secret may come in pieces, so that only whole lines go anywhere."""
        shown = hidden(_as_shown(line))
        self._stream.write(shown + end)
        self._take(shown)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
