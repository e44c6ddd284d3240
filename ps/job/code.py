"""The user's modules in this process: unpacked from a code bundle, and found before installed ones."""

from __future__ import annotations

import errno
import hashlib
import importlib
import os
import secrets
import shutil
import stat
import sys
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path

MAX_UNPACKED_BYTES, MAX_NAME_BYTES = 2 << 30, 255
OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES}
PACKAGES_FOLDER = "_steepest_packages"  # in a bundle: what was installed for the code
PACKAGES = {"steepest", "ps", "worker", "services", "torch", "numpy", "ray"}  # which a task and its process must share


def code_directory() -> Path:
    """Where this host keeps unpacked code bundles; only its user may read it."""
    directory = Path(tempfile.gettempdir()) / f"steepest-code-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def opened(bundle: bytes) -> zipfile.ZipFile:
    """Raises ValueError for what is no archive, or has members that it must not have."""
    try:
        archive = zipfile.ZipFile(BytesIO(bundle))
    except Exception as error:
        raise ValueError(f"it is no zip archive: {error}") from error
    _check_members(archive)
    return archive


def _check_members(archive: zipfile.ZipFile) -> None:
    """Raises ValueError for a member that would leave its directory, is no plain file, or unpacks to very much."""
    top = Path("/top")
    for info in archive.infolist():
        path = Path(os.path.normpath(top / info.filename))
        if not path.is_relative_to(top) or info.filename.startswith("/"):
            raise ValueError(f"its member {info.filename!r} leaves its directory")
        if not path.relative_to(top).parts or any(len(part.encode()) > MAX_NAME_BYTES for part in path.parts):
            raise ValueError(f"its member {info.filename!r} has no name that a file can have")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"its member {info.filename!r} is neither a file nor a directory")
    size = sum(info.file_size for info in archive.infolist())
    if size > MAX_UNPACKED_BYTES:
        raise ValueError(f"it unpacks to {size} bytes; allowed: {MAX_UNPACKED_BYTES}")


def unpack_code(bundle: bytes, directory: Path) -> Path:
    """Unpack a code bundle below `directory`, once per content, and return where it lies.

    Raises ValueError for an archive that is broken, or has members that it must not have.
    """
    target = directory / hashlib.sha256(bundle).hexdigest()
    if target.exists():
        return target
    temporary = directory / f".{target.name}.{secrets.token_hex(4)}"  # another thread may unpack the same
    temporary.mkdir(parents=True)
    try:
        with opened(bundle) as archive:
            archive.extractall(temporary)
    except Exception as error:  # zipfile raises of all kinds for what is torn
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in OF_THE_DISK:
            raise
        raise ValueError(f"it cannot be unpacked: {error}") from error
    try:
        temporary.rename(target)
    except OSError:  # somebody else was first
        shutil.rmtree(temporary, ignore_errors=True)
        if not target.exists():
            raise
    return target


def put_first(code: Path) -> None:
    """Have imports find the user's modules first, even those whose name an installed module has already taken."""
    if str(code) not in sys.path:
        sys.path.insert(0, str(code))
        if (code / PACKAGES_FOLDER).is_dir():  # last, for they take the place of nothing that is installed
            sys.path.append(str(code / PACKAGES_FOLDER))
        importlib.invalidate_caches()
    own = {entry.stem if entry.suffix == ".py" else entry.name for entry in code.iterdir()}
    for name in own & {module.partition(".")[0] for module in sys.modules} - set(sys.stdlib_module_names):
        found = getattr(sys.modules.get(name), "__file__", None)
        if name not in PACKAGES and (found is None or not Path(found).is_relative_to(code)):
            # Whoever has imported it keeps it; the next import finds the user's.
            for module in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
                del sys.modules[module]
