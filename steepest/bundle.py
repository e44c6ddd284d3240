"""Packs a user's task file, and what it imports and names from beside itself, into a reproducible zip archive."""

from __future__ import annotations

import ast
import io
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from steepest.errors import SpecError, Violation

RESERVED_NAMES = frozenset({"services", "worker", "ps", "steepest"})
MAX_DATA_BYTES = 64 << 20  # of files that are not code
MAX_PATH = 256  # characters
_PARSING = threading.Lock()  # Python 3.11 raises SystemError when threads parse at the same time
_SUFFIX = ".py"
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A task's code. data: a zip archive, empty when the module is installed on the cluster.

    left_out: files and folders that the code names and that are too large to go along.
    """

    module: str
    function: str
    data: bytes
    left_out: tuple[str, ...] = ()


def bundle_task(task: str, also: str = "") -> Bundle:
    """Find TASK (`path/to/file.py:function` or `package.module:function`) and pack its code.

    Modules that are imported by name from the task's directory go along, and so do other files and folders there whose
    relative path is a string in the code ("vocabulary.json", "data"), up to MAX_DATA_BYTES in all. also: a module that
    goes along if it is there. Raises SpecError.
    """
    where, colon, function = task.rpartition(":")
    if not colon or not where or not function.isidentifier():
        raise _refused(f"{task!r} names no function; allowed: path/to/file.py:function or package.module:function")
    if where.endswith(".py") or "/" in where:
        path = Path(where)
        if not path.is_file():
            raise _refused(f"there is no file {where}")
        root, module = path.resolve().parent, path.stem
        if not module.isidentifier():
            raise _refused(f"{path.name}: a task's file name must be a Python name; rename that file")
        _check_function(path, function)
    else:
        root, module = Path.cwd(), where
        if not _is_local(root, module.split(".")[0]):
            return Bundle(module, function, b"")
    files = dict(_collect(root, module.split(".")[0], set()))
    if also and _is_local(root, also.split(".", maxsplit=1)[0]):
        files |= dict(_collect(root, also.split(".", maxsplit=1)[0], set()))
    left_out = _add_named_data(root, files)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), files[name])
    return Bundle(module, function, buffer.getvalue(), tuple(left_out))


def _add_named_data(root: Path, files: dict[str, bytes]) -> list[str]:
    """Add what the strings in the code name below `root`, but for hidden files and code. Returns what is too large."""
    trees = [_tree(source) for name, source in files.items() if name.endswith(_SUFFIX)]
    nodes = (node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    named = {value.removeprefix("./").rstrip("/") for value in nodes if isinstance(value, str)}
    left_out = []
    room = MAX_DATA_BYTES
    for name in sorted(name for name in named if _is_below(root, name)):
        paths: list[Path] = []
        needed = 0
        for path in _data_files(root, root / name):
            paths.append(path)
            needed += path.stat().st_size
            if needed > room:
                left_out.append(name)
                break
        else:
            room -= needed
            for path in paths:
                files[path.relative_to(root).as_posix()] = path.read_bytes()
    return left_out


def _is_below(root: Path, name: str) -> bool:
    if not 0 < len(name) < MAX_PATH or not name.isprintable() or name.startswith(("/", "~", ".")):
        return False
    return ".." not in Path(name).parts and (root / name).exists()


def _data_files(root: Path, path: Path) -> Iterator[Path]:
    """The file, or those of the folder, that are neither code nor hidden."""
    for found in [path] if path.is_file() else path.rglob("*"):
        hidden = any(part.startswith(".") or part == "__pycache__" for part in found.relative_to(root).parts)
        if found.is_file() and found.suffix != _SUFFIX and not hidden:
            yield found


def _refused(problem: str) -> SpecError:
    return SpecError([Violation("task", problem)])


def _check_function(path: Path, function: str) -> None:
    tree = _parse(path)
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.alias(name=name, asname=alias):
                names.add(alias or name)
    if function not in names and "*" not in names:
        there = [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
        raise _refused(f"{path} has no function {function!r}; it has: {', '.join(there) or 'none'}")


def _parse(path: Path) -> ast.Module:
    try:
        return _tree(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise _refused(f"{path}{f', line {line}' if line else ''}: {error}") from None


def _tree(source: bytes, filename: str = "<unknown>") -> ast.Module:
    with _PARSING:
        return ast.parse(source, filename=filename)


def _is_local(root: Path, top: str) -> bool:
    return (root / f"{top}.py").is_file() or any((root / top).glob("*.py"))


def _collect(root: Path, top: str, seen: set[str]) -> Iterator[tuple[str, bytes]]:
    """The files of a top-level module and of all it imports from `root`, by name in the archive."""
    if top in seen or not _is_local(root, top):
        return
    if top == "steepest" and seen and (root / "steepest" / "__init__.py").is_file():
        return  # the task lies beside this very package
    path = root / f"{top}.py"
    paths = [path] if path.is_file() else sorted((root / top).rglob("*.py"))
    is_taken = top in RESERVED_NAMES or top in sys.stdlib_module_names
    if is_taken and not path.is_file() and not (root / top / "__init__.py").is_file():
        return  # a mere folder; the import finds the installed package
    seen.add(top)
    if is_taken:
        kind = "a package of the service" if top in RESERVED_NAMES else "a module of the standard library"
        shown = path if path.is_file() else root / top
        raise _refused(f"{shown}: the top-level name {top!r} is reserved for {kind}; rename that file")
    for file in paths:
        yield file.relative_to(root).as_posix(), file.read_bytes()
        for imported in _imports(_parse(file)):
            yield from _collect(root, imported, seen)


def _imports(tree: ast.Module) -> Iterator[str]:
    """The top-level names that a module imports absolutely."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]
