"""Services by name, and the one in use: a small file of the user's."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from steepest.errors import SpecError, Violation

DEFAULT_ADDRESS = "127.0.0.1:50051"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Contexts(NamedTuple):
    """addresses: of services, by name. current: the name of the one in use; empty for none."""

    addresses: dict[str, str]
    current: str = ""

    @property
    def address(self) -> str:
        """Of the service in use."""
        return self.addresses.get(self.current, DEFAULT_ADDRESS)


def path() -> Path:
    """Where contexts are kept."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "steepest" / "contexts.json"


def read() -> Contexts:
    """The contexts there are; none when the file is not there or makes no sense."""
    try:
        raw = json.loads(path().read_text())
        addresses = {str(name): str(address) for name, address in raw["addresses"].items()}
        return Contexts(addresses, str(raw["current"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Contexts({})


def _write(contexts: Contexts) -> None:
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(contexts._asdict(), indent=2) + "\n")
    temporary.rename(target)


def add(name: str, address: str) -> Contexts:
    """Remember a service; the first one is in use at once. Raises SpecError."""
    if not _NAME.fullmatch(name):
        raise SpecError([Violation("NAME", f"{name!r}; allowed: letters, digits, '.', '_' and '-', at most 63")])
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise SpecError([Violation("ADDRESS", f"{address!r} is no HOST:PORT")])
    before = read()
    contexts = Contexts({**before.addresses, name: address}, before.current or name)
    _write(contexts)
    return contexts


def use(name: str) -> Contexts:
    """Have commands talk to a service. Raises SpecError for a name that is not known."""
    before = _known(name)
    contexts = before._replace(current=name)
    _write(contexts)
    return contexts


def remove(name: str) -> Contexts:
    """Forget a service. Raises SpecError for a name that is not known."""
    before = _known(name)
    addresses = {own: address for own, address in before.addresses.items() if own != name}
    contexts = Contexts(addresses, "" if before.current == name else before.current)
    _write(contexts)
    return contexts


def _known(name: str) -> Contexts:
    contexts = read()
    if name not in contexts.addresses:
        there = ", ".join(contexts.addresses) or "none"
        raise SpecError([Violation("NAME", f"there is no context {name!r}; there are: {there}")])
    return contexts
