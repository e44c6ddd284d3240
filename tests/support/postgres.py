"""A PostgreSQL server of the tests' own, on a Unix socket alone."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

USER = "postgres"


def _binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


class Postgres:
    """A running server. It runs as the user postgres when the tests run as root, for it refuses to be root."""

    def __init__(self, directory: Path, binaries: Path) -> None:
        self._directory = directory
        self._binaries = binaries
        self._as_user = ["runuser", "-u", USER, "--"] if os.getuid() == 0 else []
        self._number = 0
        self._run("initdb", "-D", str(directory / "data"), "-U", USER, "-A", "trust", "--no-sync")
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as_user, str(self._binaries / program), *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=self._directory, timeout=60)

    def start(self) -> None:
        """Start it, again perhaps."""
        options = f"-k {self._directory} -c listen_addresses= -c fsync=off"
        log = str(self._directory / "log")
        # Its output goes to the log; a pipe would be held open by the server.
        command = [str(self._binaries / "pg_ctl"), "-D", str(self._directory / "data"), "-o", options, "-l", log]
        subprocess.run(
            [*self._as_user, *command, "-w", "start"],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self._directory, timeout=60,
        )  # fmt: skip

    def stop(self) -> None:
        """Stop it at once; what was committed is kept."""
        self._run("pg_ctl", "-D", str(self._directory / "data"), "-m", "immediate", "-w", "stop")

    def database(self) -> str:
        """The URL of a new, empty database."""
        self._number += 1
        name = f"jobs{self._number}"
        self._run("createdb", "-h", str(self._directory), "-U", USER, name)
        return f"postgresql:///{name}?host={self._directory}&user={USER}"


@contextlib.contextmanager
def postgres_server() -> Iterator[Postgres]:
    """Skips where PostgreSQL is not installed, and fails there in continuous integration."""
    binaries = _binaries()
    if binaries is None:
        if os.environ.get("CI"):
            pytest.fail("PostgreSQL is not installed: apt-get install postgresql")
        pytest.skip("PostgreSQL is not installed")
    directory = Path(tempfile.mkdtemp(prefix="steepest-postgres-"))
    if os.getuid() == 0:
        os.chown(directory, pwd.getpwnam(USER).pw_uid, -1)
    server = Postgres(directory, binaries)
    try:
        yield server
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):  # a test has stopped it
            server.stop()
        shutil.rmtree(directory)
