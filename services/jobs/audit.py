"""Who has changed what, and who was refused: a file of JSON lines for those who have to account for a service."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

from steepest.errors import PermissionDeniedError, TooManyCallsError, UnauthenticatedError

MAX_BYTES, NUM_FILES = 16 << 20, 10  # of a file, after which another begins; and of those before it
MAX_SHOWN = 200  # characters of what a caller may choose

log = logging.getLogger(__name__)


@dataclass
class Call:
    """What is known of a call so far. caller: name of the token. target: what it is about, such as trainingJobs/a."""

    method: str
    peer: str
    target: str = ""
    caller: str = ""


class Audit:
    """The file, which is written from many threads. A full disk ends no call."""

    def __init__(self, path: Path) -> None:
        self._handler = RotatingFileHandler(path, maxBytes=MAX_BYTES, backupCount=NUM_FILES, delay=True)
        self._handler.handleError = lambda record: log.warning(  # type: ignore[method-assign]
            "%s cannot be written", path, exc_info=True
        )

    @contextmanager
    def of(self, call: Call, *, changes: bool) -> Iterator[Call]:
        """Note a call when it ends, if it `changes` anything or was refused. The caller fills in what it finds out."""
        outcome = "ok"
        try:
            yield call
        except Exception as error:
            outcome = type(error).__name__.removesuffix("Error")
            changes |= isinstance(error, PermissionDeniedError | UnauthenticatedError)
            changes &= not isinstance(error, TooManyCallsError)  # which would fill the log
            raise
        finally:
            if changes:
                self._note(call, outcome)

    def _note(self, call: Call, outcome: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        shown = {name: value[:MAX_SHOWN] for name, value in asdict(call).items()}
        line = json.dumps({"time": now, **shown, "outcome": outcome})
        self._handler.handle(logging.LogRecord(__name__, logging.INFO, "", 0, "%s", (line,), None))

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._handler.close()
