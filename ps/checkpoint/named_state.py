"""Between the flat layout and named tensors: how a job's state goes into a checkpoint and comes back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from ps.checkpoint.files import State
from ps.memory.raw import raw_bytes
from ps.numerics.optimizer import StatePart
from ps.numerics.threads import copy_all
from ps.parameters.description import ModelDescription, TensorDescription
from ps.parameters.layout import Layout
from ps.step.best import Standing

AVERAGED = "average."  # before the name of a parameter that `state_dict` does not show


def pack_buffers(tensors: Iterable[torch.Tensor]) -> bytes:
    """Buffers one after another, raw little-endian."""
    return b"".join(map(raw_bytes, tensors))


def unpack_buffers(model: ModelDescription, packed: bytes) -> dict[str, torch.Tensor]:
    """The inverse of `pack_buffers`. Raises ValueError when the length is wrong."""
    return _unpack(model.buffers, packed, "buffers")


def _unpack(tensors: Iterable[TensorDescription], packed: bytes, what: str) -> dict[str, torch.Tensor]:
    data = bytearray(packed)
    result: dict[str, torch.Tensor] = {}
    offset = 0
    for b in tensors:
        dtype = getattr(torch, b.dtype)
        if b.nbytes:
            result[b.name] = torch.frombuffer(data, dtype=dtype, count=b.numel, offset=offset).view(b.shape)
        else:
            result[b.name] = torch.empty(b.shape, dtype=dtype)
        offset += b.nbytes
    if offset != len(data):
        raise ValueError(f"{what} are {len(data)} bytes; the model's are {offset}")
    return result


def assemble(
    model: ModelDescription,
    layout: Layout,
    flat: torch.Tensor,
    buffers: bytes,
    constants: bytes,
    optimizer: Iterable[StatePart],
    *,
    standing: Standing,
    average: torch.Tensor | None = None,
    compression: Mapping[str, torch.Tensor] | None = None,
) -> State:
    """The state of all shards as named tensors. flat: the whole layout, shape (layout.numel,).

    extra gets what `state_dict` does not show: buffers that are not persistent, and parameters that it hides.

    average: of the parameters, as `flat`. compression: from `compression_state`.
    """

    def all_of(flat: torch.Tensor) -> dict[str, torch.Tensor]:
        named = _named(layout, flat)
        named.update({name: torch.view_as_complex(named[name]) for name in pairs})
        named.update(unpacked)
        for a in model.aliases:
            base = named[a.of]
            named[a.name] = base.as_strided(a.shape, a.stride, base.storage_offset() + a.offset)
        return named

    pairs = {p.name: p.shape for p in model.parameters if p.is_complex}
    unpacked = {**unpack_buffers(model, buffers), **_unpack(model.constants, constants, "constants")}
    named, averaged = all_of(flat), {} if average is None else all_of(average)
    shown = dict(model.state_names)
    elsewhere = {*shown.values(), *(a.name for a in model.aliases)}
    shapes = {p.name: p.shape for p in model.parameters}
    states: dict[str, torch.Tensor] = {}
    copies = []
    for part in optimizer:
        key = f"{part.parameter}.{part.state}"
        if key not in states:
            shape = shapes[part.parameter] if part.shape is None else part.shape
            states[key] = torch.zeros(shape, dtype=part.values.dtype)
        copies.append((states[key].view(-1)[part.offset : part.offset + part.values.numel()], part.values))
    copy_all(copies)
    states = {key: torch.view_as_complex(s) if _is_of(key, s, pairs) else s for key, s in states.items()}
    return State(
        standing=standing,
        model={key: named[name] for key, name in shown.items()},
        optimizer=states,
        extra={name: tensor for name, tensor in named.items() if name not in elsewhere}
        | {AVERAGED + p.name: averaged[p.name] for p in model.parameters if averaged and p.name not in elsewhere},
        average={key: averaged[name] for key, name in shown.items()} if averaged else {},
        compression=dict(compression or {}),
    )


def _is_of(key: str, state: torch.Tensor, pairs: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a tensor of the optimizer has an element for each of a complex parameter's."""
    return any(key.startswith(f"{name}.") and tuple(state.shape) == shape for name, shape in pairs.items())


def compression_state(
    layout: Layout, master: torch.Tensor | None, residuals: Mapping[int, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What a lossy job has to keep, as named tensors.

    master: what the optimizer works on, when workers have something else, shape (layout.numel,): "master.{parameter}".
    residuals: of each part, shape (layout.numel + the codec's state,): "residual.{part}.{parameter}", "codec.{part}".
    """
    named = {}
    if master is not None:
        named.update(_named(layout, master, "master."))
    for part, residual in sorted(residuals.items()):
        named.update(_named(layout, residual[: layout.numel], f"residual.{part}."))
        if len(residual) > layout.numel:
            named[f"codec.{part}"] = residual[layout.numel :]
    return named


def _named(layout: Layout, flat: torch.Tensor, prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}{p.name}": view for p, view in zip(layout.parameters, layout.views(flat), strict=True)}


def master_of(layout: Layout, named: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The master parameters in a `compression_state`, shape (layout.numel,); None without."""
    return _flat(layout, named, "master.") if any(name.startswith("master.") for name in named) else None


def residuals_of(layout: Layout, named: Mapping[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The residuals in a `compression_state`, by part."""
    parts = {int(name.split(".")[1]) for name in named if name.startswith("residual.")}
    residuals = {}
    for part in parts:
        residual = _flat(layout, named, f"residual.{part}.")
        state = named.get(f"codec.{part}")
        residuals[part] = residual if state is None else torch.cat([residual, state])
    return residuals


def _flat(layout: Layout, named: Mapping[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
    """The inverse of `_named`. Raises KeyError for a missing name, ValueError for another shape."""
    flat = torch.zeros(layout.numel, dtype=layout.dtype)
    for p, view in zip(layout.parameters, layout.views(flat), strict=True):
        view.copy_(_checked(named, f"{prefix}{p.name}", p.shape))
    return flat


@dataclass(frozen=True)
class Restored:
    """A checkpoint as servers need it.

    flat: the parameters, shape (layout.numel,); buffers, constants: packed. average: of the parameters, as `flat`.
    """

    state: State
    flat: torch.Tensor
    buffers: bytes
    constants: bytes
    average: torch.Tensor | None = None


def restore(model: ModelDescription, layout: Layout, state: State) -> Restored:
    """The inverse of `assemble`. Raises KeyError for a missing name, ValueError for another shape."""
    pairs = {p.name for p in model.parameters if p.is_complex}

    def all_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        by_name = {**state.extra, **{name: tensors[key] for key, name in model.state_names}}
        return by_name | {name: torch.view_as_real(by_name[name]) for name in pairs & by_name.keys()}

    by_name = all_of(state.model)
    if pairs:  # states of complex parameters are complex, too
        optimizer = {k: torch.view_as_real(s) if s.is_complex() else s for k, s in state.optimizer.items()}
        state = replace(state, optimizer=optimizer)

    def packed(tensors: Iterable[TensorDescription]) -> bytes:
        return pack_buffers(_checked(by_name, t.name, t.shape) for t in tensors)

    average = None
    if state.average:
        hidden = {k.removeprefix(AVERAGED): v for k, v in all_of(state.model).items() if k.startswith(AVERAGED)}
        hidden = {k: torch.view_as_real(v) if k in pairs else v for k, v in hidden.items()}
        average = _flat(layout, all_of(state.average) | hidden)
    return Restored(state, _flat(layout, by_name), packed(model.buffers), packed(model.constants), average)


def _checked(tensors: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} in the checkpoint and {shape} in the model")
    return tensor
