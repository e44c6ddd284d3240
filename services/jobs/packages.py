"""Packages that a job's code needs and that are not installed: resolved once, at submission, and sent with the code."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from packaging.utils import canonicalize_name

from ps.job.code import PACKAGES_FOLDER, opened
from steepest.bundle import RESERVED_NAMES
from steepest.errors import SpecError, Violation

RECORD = f"{PACKAGES_FOLDER}/requirements.json"  # what they were chosen for, and which they are
MOST_SAID = 600  # characters of what pip says
_EPOCH = (1980, 1, 1, 0, 0, 0)
_PIP = (sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "--retries", "1")


class Packed(NamedTuple):
    """A zip archive of code and packages, and the packages in it, as name==version."""

    code: bytes
    packages: tuple[str, ...]


def with_packages(code: bytes, requirements: Sequence[str], *, seconds: float, max_bytes: int) -> Packed:
    """The code, and beside it what has to be installed for it, from wheels of the index that pip is set up for.

    What is installed here stays as it is, and a package that would replace some of it is refused. Code that has
    packages for the same requirements keeps them, so that a job that is submitted again is the same. seconds: that pip
    may take, in each of two calls. Raises SpecError.
    """
    wanted = sorted(requirements)
    if not wanted and not _has_packages(code):
        return Packed(code, ())
    members = _members(code)
    if RECORD in members:
        before = json.loads(members[RECORD])
        if before["requirements"] == wanted:
            return Packed(code, tuple(before["packages"]))
        members = {name: data for name, data in members.items() if not name.startswith(f"{PACKAGES_FOLDER}/")}
        code = _zipped(members)
    if not wanted:
        return Packed(code, ())
    with tempfile.TemporaryDirectory(prefix="steepest-packages-") as directory:
        chosen = _resolve(wanted, Path(directory), seconds)
        packages = tuple(f"{each['metadata']['name']}=={each['metadata']['version']}" for each in chosen)
        if not chosen:
            return Packed(code, ())
        target = Path(directory) / "packages"
        _install(chosen, target, Path(directory), seconds)
        _check_modules(target, packages)
        for path in sorted(target.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                members[f"{PACKAGES_FOLDER}/{path.relative_to(target).as_posix()}"] = path.read_bytes()
    members[RECORD] = json.dumps({"requirements": wanted, "packages": packages}).encode()
    packed = _zipped(members)
    if len(packed) > max_bytes:
        problem = f"{', '.join(packages)} and the code come to {len(packed)} bytes; allowed: {max_bytes}"
        raise _refused(f"{problem}. Have large packages installed where Ray runs")
    return Packed(packed, packages)


def _has_packages(code: bytes) -> bool:
    if not code:
        return False
    with opened(code) as archive:
        return RECORD in archive.namelist()


def _members(code: bytes) -> dict[str, bytes]:
    if not code:
        return {}
    with opened(code) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist() if not info.is_dir()}


def _zipped(members: dict[str, bytes]) -> bytes:
    """The same bytes for the same members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(members):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), members[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _resolve(requirements: Sequence[str], directory: Path, seconds: float) -> list[dict[str, Any]]:
    """What pip would install, by its report. Raises SpecError, too for what would take another version's place."""
    report = directory / "report.json"
    options = ("--dry-run", "--only-binary", ":all:", "--report", str(report))
    _pip(("install", *options, "--", *requirements), seconds)
    chosen: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    installed = {canonicalize_name(each.name): each.version for each in metadata.distributions() if each.name}
    for each in chosen:
        name, version = each["metadata"]["name"], each["metadata"]["version"]
        there = installed.get(canonicalize_name(name))
        if there is not None:
            problem = f"they need {name} {version}, and {name} {there} is installed here, which other jobs share"
            raise _refused(f"{problem}: ask for versions that go with it")
    return chosen


def _install(chosen: Sequence[dict[str, Any]], target: Path, directory: Path, seconds: float) -> None:
    """Lay the chosen files down below `target`, and no other ones. Raises SpecError."""
    listed = directory / "requirements.txt"
    listed.write_text("".join(f"{_pinned(each)}\n" for each in chosen))
    options = ("--no-deps", "--only-binary", ":all:", "--no-compile", "--target", str(target))
    _pip(("install", *options, "--requirement", str(listed)), seconds)


def _check_modules(target: Path, packages: Sequence[str]) -> None:
    """Raises SpecError for a module that would not be found, because one that is installed has its name."""
    taken = {*RESERVED_NAMES, *sys.stdlib_module_names, *metadata.packages_distributions()}
    for path in sorted(target.iterdir()):
        name = path.name.partition(".")[0]
        found = importlib.util.find_spec(name) if name in taken else None
        if found is not None and found.origin is not None:  # else a namespace, which many share
            problem = f"one of {', '.join(packages)} has a module {name!r}, and so has what is installed here"
            raise _refused(f"{problem}: the installed one would be imported")


def _pinned(chosen: dict[str, Any]) -> str:
    hashes = chosen["download_info"].get("archive_info", {}).get("hashes", {})
    pinned = f"{chosen['metadata']['name']}=={chosen['metadata']['version']}"
    return " ".join([pinned, *(f"--hash={kind}:{digest}" for kind, digest in sorted(hashes.items()))])


def _pip(arguments: Sequence[str], seconds: float) -> None:
    command = [*_PIP, *arguments]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            text=True,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise _refused(f"pip has not chosen packages for them within {seconds:g} s") from None
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise _refused("this service's Python has no pip; have it or the packages installed where the service runs")
    conflict = done.stdout.partition("The conflict is caused by:")[2].partition("To fix this")[0]
    said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    raise _refused(f"pip cannot install them: {' '.join(' '.join([conflict, *said]).split())[:MOST_SAID]}")


def _refused(problem: str) -> SpecError:
    return SpecError([Violation("requirements", problem)])
