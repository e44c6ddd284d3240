"""Connections to the database: SQLite in a file of the data directory, or PostgreSQL by its URL."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import sqlalchemy as sa

from steepest.errors import ServiceUnavailableError

log = logging.getLogger(__name__)

RETRY_SECONDS = 30.0  # for a PostgreSQL that starts again; meanwhile jobs go on
PATIENT_SECONDS = 3600.0
# A host that is gone without a word is found out after so many seconds (of libpq: the last in milliseconds).
PATIENCE = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 15_000,
}
CHECK_SECONDS = 2.0
PAUSE_SECONDS = 0.2
MOST_CONNECTIONS = 24  # all of them kept: to open one costs more than most of what it is opened for
CLAIM = 0x7374656570657374  # the advisory lock of the one service that uses a database: "steepest"

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


def open_database(url: str) -> sa.Engine:
    """An engine for a URL (sqlite:///FILE, postgresql://USER:PASSWORD@HOST/NAME). Raises ServiceUnavailableError."""
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise ServiceUnavailableError("the database URL cannot be read; it is like postgresql://HOST/NAME") from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise ServiceUnavailableError(f"a database of {parsed.drivername} cannot be used; allowed: sqlite, postgresql")
    try:
        is_sqlite = parsed.drivername == "sqlite"
        engine = sa.create_engine(
            parsed,
            pool_pre_ping=not is_sqlite,
            connect_args={} if is_sqlite else PATIENCE,
            pool_size=MOST_CONNECTIONS,
            max_overflow=0,
        )
    except ModuleNotFoundError as error:
        raise ServiceUnavailableError(
            f"PostgreSQL needs the package {error.name!r}: pip install 'steepest[postgres]'"
        ) from None
    if parsed.drivername == "sqlite":
        sa.event.listen(engine, "connect", _configure_sqlite)
        return engine
    try:
        with engine.connect():
            pass
    except sa.exc.OperationalError as error:
        shown = parsed.render_as_string(hide_password=True)
        raise ServiceUnavailableError(f"the database {shown} does not answer: {_said(error)}") from None
    return engine


class Claim:
    """Holds a PostgreSQL database for this service alone, by an advisory lock of one connection.

    lost: called when another service has taken the database while it was away. Raises ServiceUnavailableError when
    another service uses it.
    """

    def __init__(self, engine: sa.Engine, lost: Callable[[], None]) -> None:
        self._engine = engine
        self._lost = lost
        self._ended = threading.Event()
        connection = self._take()
        if connection is None:
            raise ServiceUnavailableError("another service uses this database; give each a database of its own")
        self._connection = connection
        threading.Thread(target=self._watch, name="claim", daemon=True).start()

    def _take(self) -> sa.Connection | None:
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        if connection.execute(sa.select(sa.func.pg_try_advisory_lock(CLAIM))).scalar():
            return connection
        connection.close()
        return None

    def _watch(self) -> None:
        """The lock goes with the connection: take it again when the database is back."""
        is_held = True
        while not self._ended.wait(CHECK_SECONDS):
            if is_held:
                try:
                    self._connection.execute(sa.select(1))
                    continue
                except sa.exc.DBAPIError:
                    is_held = False  # never to be asked again: it would connect anew, without the lock
                    self._connection.close()
            try:
                connection = self._take()
            except sa.exc.DBAPIError:
                continue  # it is still away
            if connection is None:
                log.critical("another service has taken the database while it was away; this one stops")
                self._lost()
                return
            self._connection, is_held = connection, True

    def close(self) -> None:
        """Give the database free."""
        self._ended.set()
        with contextlib.suppress(sa.exc.DBAPIError):
            self._connection.close()


def retried(method: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Have a whole transaction made again while PostgreSQL does not answer, for the object's `retry_seconds`.

    Raises ServiceUnavailableError after that.
    """

    @functools.wraps(method)
    def call(*arguments: Parameters.args, **named: Parameters.kwargs) -> Returned:
        deadline = time.monotonic() + float(arguments[0].retry_seconds)  # type: ignore[attr-defined]
        while True:
            try:
                return method(*arguments, **named)
            except (sa.exc.OperationalError, sa.exc.InterfaceError) as error:
                if time.monotonic() > deadline or _is_sqlite(error):
                    raise ServiceUnavailableError(f"the database does not answer: {_said(error)}") from error
            except sa.exc.TimeoutError as error:  # of the pool
                if time.monotonic() > deadline:
                    raise ServiceUnavailableError("the database is too busy to answer") from error
            time.sleep(PAUSE_SECONDS)

    return call


def text(value: str) -> str:
    """A text as both databases can hold it: PostgreSQL takes no zero bytes."""
    return value.replace("\x00", "\\x00")


def _is_sqlite(error: sa.exc.DBAPIError) -> bool:
    return type(error.orig).__module__.startswith("sqlite3")


def _said(error: sa.exc.DBAPIError) -> str:
    return str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else type(error.orig).__name__


def _configure_sqlite(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA busy_timeout=10000")
    cursor.close()
