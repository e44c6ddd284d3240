"""Model descriptions for the tests of this room."""

from __future__ import annotations

from collections.abc import Sequence

from ps.parameters.description import ModelDescription, TensorDescription


def described(shapes: Sequence[tuple[int, ...]], dtype: str = "float32") -> ModelDescription:
    parameters = tuple(TensorDescription(f"p{i}", shape, dtype) for i, shape in enumerate(shapes))
    return ModelDescription(parameters, (), tuple((p.name, p.name) for p in parameters))
