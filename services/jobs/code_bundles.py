"""Code bundles: zip archives of user code, kept under their SHA-256."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from ps.job.code import PACKAGES_FOLDER, opened, unpack_code
from services.jobs.packages import with_packages
from steepest.bundle import RESERVED_NAMES
from steepest.errors import SpecError, Violation

UNPACKED = "unpacked"
UNUSED_SECONDS = 86_400.0  # between the upload of code and the job it is for there may be a while
_NAME = re.compile(r"codeBundles/[0-9a-f]{64}")


class CodeStore:
    """Bundles in a directory."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        directory.mkdir(parents=True, exist_ok=True)

    def add(self, pieces: Iterable[bytes]) -> str:
        """Store a bundle and return its name. Raises SpecError for what is too large, no zip archive, or reserved."""
        data = bytearray()
        for piece in pieces:
            data += piece
            if len(data) > self._max_bytes:
                raise SpecError([Violation("data", f"the code is larger than {self._max_bytes} bytes")])
        try:
            with opened(bytes(data)) as archive:
                check_reserved(archive.namelist())
        except ValueError as error:
            raise SpecError([Violation("data", f"is no archive of code: {error}")]) from None
        return self._keep(bytes(data))

    def with_packages(self, name: str, requirements: Sequence[str], seconds: float) -> tuple[str, tuple[str, ...]]:
        """(the name of a bundle with packages for a code, what they are). Raises SpecError.

        name: of a bundle, or empty. See services.jobs.packages.
        """
        code = self.read(name)
        packed = with_packages(code, requirements, seconds=seconds, max_bytes=self._max_bytes)
        return name if packed.code == code else self._keep(packed.code), packed.packages

    def _keep(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        path = self._directory / f"{digest}.zip"
        if path.exists():
            os.utime(path)  # a job is about to be submitted with it
        else:
            temporary = path.with_suffix(f".{secrets.token_hex(4)}.tmp")  # another call may have the same code
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        return f"codeBundles/{digest}"

    def read(self, name: str) -> bytes:
        """The bytes of a bundle; none for the empty name. Raises SpecError when there is no such bundle."""
        if not name:
            return b""
        path = self._directory / f"{name.removeprefix('codeBundles/')}.zip"
        if not _NAME.fullmatch(name) or not path.exists():
            raise SpecError([Violation("task.code_bundle", f"{name!r} is not there; upload the code first")])
        os.utime(path)
        return path.read_bytes()

    def delete_unused(self, used: Collection[str], now: float) -> list[str]:
        """Delete bundles that were not asked for in the last day and that no job has; returns their names.

        used: the names of those that jobs have.
        """
        deleted = []
        for path in self._directory.iterdir():
            name = f"codeBundles/{path.stem}"
            if path.suffix not in (".zip", ".tmp") or name in used or now - path.stat().st_mtime < UNUSED_SECONDS:
                continue
            path.unlink(missing_ok=True)
            if path.suffix == ".zip":
                shutil.rmtree(self._directory / UNPACKED / path.stem, ignore_errors=True)
                deleted.append(name)
        return deleted

    def unpacked(self, name: str) -> Path | None:
        """A directory with the files of a bundle; None for the empty name."""
        if not name:
            return None
        try:
            return unpack_code(self.read(name), self._directory / UNPACKED)
        except ValueError as error:
            raise SpecError([Violation("task.code_bundle", f"{name}: {error}")]) from None


def check_reserved(names: Iterable[str]) -> None:
    """Raises SpecError for a member that would hide a package of the service."""
    for name in names:
        top = name.split("/")[0].removesuffix(".py")
        if top in RESERVED_NAMES or top == PACKAGES_FOLDER:
            problem = f"{name}: the top-level name {top!r} is reserved in a worker; rename that file"
            raise SpecError([Violation("task.code_bundle", problem)])
