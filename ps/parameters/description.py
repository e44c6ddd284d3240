"""What a model is made of, as far as a server needs to know: names, shapes and dtypes, no values."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class TensorDescription:
    """One named tensor. `dtype` is torch's name without the prefix, such as "float32".

    held: of a parameter, the type in which the model holds it, if that is another: a lower precision, of which dtype is
    the master's, or a complex one, of which shape and dtype are those of pairs of reals.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    held: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def is_complex(self) -> bool:
        """Whether pairs of its elements are complex numbers."""
        return self.held.startswith("complex")

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.numel * int(getattr(torch, self.dtype).itemsize)


@dataclass(frozen=True, slots=True)
class AliasDescription:
    """A tensor that lies in the memory of a trainable parameter, as `of.as_strided(shape, stride, offset)`."""

    name: str
    of: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class GroupDescription:
    """Parameters that are updated alike. lr_scale: times the job's learning rate. weight_decay: None for the job's."""

    names: tuple[str, ...]
    lr_scale: float
    weight_decay: float | None


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model's trainable parameters, its other state, and the names both have in `state_dict`.

    parameters: the trainable parameters, tied ones once, in the order of `named_parameters()`.
    buffers: what forward passes may change.
    state_names: `state_dict` key -> name of the tensor it shows; tied ones appear under each key.
    constants: frozen parameters, which stay as the task made them.
    groups: parameters with a learning rate or weight decay of their own.
    aliases: what lies in the memory of a trainable parameter.
    """

    parameters: tuple[TensorDescription, ...]
    buffers: tuple[TensorDescription, ...]
    state_names: tuple[tuple[str, str], ...]
    constants: tuple[TensorDescription, ...] = ()
    aliases: tuple[AliasDescription, ...] = ()
    groups: tuple[GroupDescription, ...] = ()

    def constant_places(self) -> tuple[tuple[int, ...], int]:
        """(where each constant begins in a memory they share, the bytes of them all), both multiples of 64."""
        ends = list(accumulate((-(-constant.nbytes // 64) * 64 for constant in self.constants), initial=0))
        return tuple(ends[:-1]), ends[-1]

    def is_same_as(self, other: ModelDescription) -> bool:
        """Whether both have the same tensors, in whatever order they are registered."""
        own, theirs = (
            [set(d.parameters), set(d.buffers), set(d.constants), set(d.aliases), set(d.state_names), set(d.groups)]
            for d in (self, other)
        )
        return own == theirs

    def sha256(self) -> str:
        """A digest by which a worker and a server see that they speak of the same model."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can carry."""
        return asdict(self)

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> ModelDescription:
        """The inverse of `to_dict`."""

        def tensors(key: str) -> tuple[TensorDescription, ...]:
            return tuple(
                TensorDescription(t["name"], tuple(t["shape"]), t["dtype"], t.get("held", "")) for t in raw.get(key, ())
            )

        return ModelDescription(
            parameters=tensors("parameters"),
            buffers=tensors("buffers"),
            state_names=tuple((key, name) for key, name in raw["state_names"]),
            constants=tensors("constants"),
            aliases=tuple(
                AliasDescription(a["name"], a["of"], tuple(a["shape"]), tuple(a["stride"]), a["offset"])
                for a in raw.get("aliases", ())
            ),
            groups=tuple(
                GroupDescription(tuple(g["names"]), g["lr_scale"], g["weight_decay"]) for g in raw.get("groups", ())
            ),
        )
