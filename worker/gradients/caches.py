"""Attributes in which modules keep what they computed: every pass starts without, so that no worker's past shows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn


class Caches:
    """names: of attributes, as `module.path.attribute`, that passes change; roots: modules, by the prefix of names."""

    def __init__(self, roots: Iterable[tuple[str, nn.Module]], names: Iterable[str]) -> None:
        modules: dict[str, nn.Module] = {}
        for prefix, root in roots:
            modules.update(root.named_modules(prefix=prefix.removesuffix(".")))
        self._start: list[tuple[nn.Module, str, Any, Any]] = []
        for name in names:
            path, _, key = name.rpartition(".")
            module = modules.get(path)
            if module is not None:
                value = vars(module).get(key, _ABSENT)
                self._start.append((module, key, value, _contents(value)))

    def restore(self) -> None:
        """Have all as it was at the start."""
        for module, key, value, contents in self._start:
            if value is _ABSENT:
                vars(module).pop(key, None)
                continue
            vars(module)[key] = value
            if contents is not None:
                _refill(value, contents)


_ABSENT = object()


def _contents(value: Any) -> Any:
    """A copy of what a container holds; None for what is no container."""
    return value.copy() if isinstance(value, dict | list | set | deque) else None


def _refill(value: Any, contents: Any) -> None:
    value.clear()
    if isinstance(value, Mapping | set):
        value.update(contents)  # type: ignore[union-attr]
    else:
        value.extend(contents)
