"""An optimizer's state of one parameter as named tensors, whatever it is made of, and back.

torch.optim's optimizers keep a dictionary of tensors, and those go by their own names. Others keep numbers, lists and
dictionaries besides, count in their parameter group, or have transposed matrices: such a state has one more entry,
STRUCTURE, with JSON in it, and the tensors within it are numbered.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

STRUCTURE = "@structure"
GROUP_ONLY = frozenset({"params", "lr", "lr_scale"})  # entries of a parameter group that are no state
_PLAIN = (bool, int, str, type(None))


class StateKindError(Exception):
    """An optimizer keeps something that cannot be written down. The message says what."""


def pack_state(state: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Named tensors that hold a parameter's state, and what its parameter group counts.

    Tensors of `state` keep their names; no name has a dot in it. Raises StateKindError.
    """
    named: dict[str, torch.Tensor] = {}
    rest: dict[str, Any] = {}
    for name, value in state.items():
        is_named = isinstance(name, str) and not set(name) & set(".@\n")
        (named if is_named and isinstance(value, torch.Tensor) else rest)[name] = value
    inner: list[torch.Tensor] = []
    raw = {"state": _packed(rest, "state", inner), "group": _packed(dict(group), "group", inner)}
    named.update({f"@{index}": tensor for index, tensor in enumerate(inner)})
    raw["strides"] = {name: value.stride() for name, value in named.items() if not value.is_contiguous()}
    if rest or group or raw["strides"]:
        named[STRUCTURE] = torch.frombuffer(bytearray(json.dumps(raw).encode()), dtype=torch.uint8)
    return named


def unpack_state(named: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inverse of `pack_state`: (state, group)."""
    if STRUCTURE not in named:
        return dict(named), {}
    raw = json.loads(named[STRUCTURE].cpu().numpy().tobytes())
    tensors = {name: _strided(value, raw["strides"].get(name)) for name, value in named.items()}
    state: dict[str, Any] = {name: value for name, value in tensors.items() if not name.startswith("@")}
    return {**state, **_unpacked(raw["state"], tensors)}, _unpacked(raw["group"], tensors)


def _strided(value: torch.Tensor, stride: Sequence[int] | None) -> torch.Tensor:
    """The same values, laid out as they were: a matrix product has other bits with a transposed matrix."""
    if stride is None or value.stride() == tuple(stride) or 0 in stride:
        return value
    laid_out = torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device)
    return laid_out.copy_(value)


def counted(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What a parameter group has that is new since `before`, or another value."""
    return {
        name: value
        for name, value in now.items()
        if name not in GROUP_ONLY and not (name in before and _same(before[name], value))
    }


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(two, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) and torch.equal(one, two)
    return type(one) is type(two) and bool(one == two)


def _packed(value: Any, where: str, inner: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        inner.append(value)
        return {"tensor": len(inner) - 1}
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) in (list, tuple):
        items = [_packed(item, f"{where}[{index}]", inner) for index, item in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if isinstance(value, dict):
        return {"dict": [[_packed(k, where, inner), _packed(v, f"{where}[{k!r}]", inner)] for k, v in value.items()]}
    raise StateKindError(
        f"it keeps a {type(value).__name__} in {where}; allowed: tensors, numbers, text, lists, tuples and dictionaries"
    )


def _unpacked(raw: Any, inner: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(raw, list):
        return [_unpacked(item, inner) for item in raw]
    if not isinstance(raw, dict):
        return raw
    [(kind, value)] = raw.items()
    match kind:
        case "tensor":
            return inner[f"@{value}"]
        case "float":
            return float(value)
        case "tuple":
            return tuple(_unpacked(item, inner) for item in value)
        case _:
            return {_unpacked(key, inner): _unpacked(item, inner) for key, item in value}
