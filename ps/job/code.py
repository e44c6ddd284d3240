"""The user's modules in this process: unpacked from a code bundle, and found before installed ones."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path

PACKAGES = {"steepest", "ps", "worker", "services", "torch", "numpy", "ray"}  # which a task and its process must share


def code_directory() -> Path:
    """Where this host keeps unpacked code bundles; only its user may read it."""
    directory = Path(tempfile.gettempdir()) / f"steepest-code-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def unpack_code(bundle: bytes, directory: Path) -> Path:
    """Unpack a code bundle below `directory`, once per content, and return where it lies.

    Raises ValueError for a member whose name would leave the directory.
    """
    target = directory / hashlib.sha256(bundle).hexdigest()
    if target.exists():
        return target
    temporary = directory / f".{target.name}.{os.getpid()}"
    with zipfile.ZipFile(BytesIO(bundle)) as archive:
        for name in archive.namelist():
            if not (temporary / name).resolve().is_relative_to(temporary.resolve()):
                raise ValueError(f"the code bundle has a member {name!r} that leaves its directory")
        archive.extractall(temporary)
    try:
        temporary.rename(target)
    except OSError:  # another process was first
        if not target.exists():
            raise
    return target


def put_first(code: Path) -> None:
    """Have imports find the user's modules first, even those whose name an installed module has already taken."""
    if str(code) not in sys.path:
        sys.path.insert(0, str(code))
        importlib.invalidate_caches()
    own = {entry.stem if entry.suffix == ".py" else entry.name for entry in code.iterdir()}
    for name in own & {module.partition(".")[0] for module in sys.modules} - set(sys.stdlib_module_names):
        found = getattr(sys.modules.get(name), "__file__", None)
        if name not in PACKAGES and (found is None or not Path(found).is_relative_to(code)):
            # Whoever has imported it keeps it; the next import finds the user's.
            for module in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
                del sys.modules[module]
