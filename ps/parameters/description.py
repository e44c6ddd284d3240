"""What a model is made of, as far as a server needs to know: names, shapes and dtypes, no values."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from math import prod
from typing import Any


@dataclass(frozen=True, slots=True)
class TensorDescription:
    """One named tensor. `dtype` is torch's name without the prefix, such as "float32"."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model's trainable parameters, its other state, and the names both have in `state_dict`.

    parameters: the trainable parameters, tied ones once, in the order of `named_parameters()`.
    buffers: everything else that is part of the state: buffers and frozen parameters.
    state_names: `state_dict` key -> name of the parameter or buffer it shows; tied ones appear under each key.
    """

    parameters: tuple[TensorDescription, ...]
    buffers: tuple[TensorDescription, ...]
    state_names: tuple[tuple[str, str], ...]

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
            return tuple(TensorDescription(t["name"], tuple(t["shape"]), t["dtype"]) for t in raw[key])

        return ModelDescription(
            parameters=tensors("parameters"),
            buffers=tensors("buffers"),
            state_names=tuple((key, name) for key, name in raw["state_names"]),
        )
