"""The part of the job spec that names packages which a task's code needs."""

from __future__ import annotations

from typing import Annotated

from packaging.requirements import InvalidRequirement, Requirement
from pydantic import AfterValidator, Field

EXAMPLE = "einops or einops>=0.8,<1"


def _from_an_index(text: str) -> str:
    """As packaging writes it: options of pip, files and addresses are none."""
    try:
        requirement = Requirement(text)
    except InvalidRequirement:
        raise ValueError(f"{text!r} is no requirement; allowed: a package of an index, as {EXAMPLE}") from None
    if requirement.url is not None:
        raise ValueError(f"{text!r} names an address; allowed: a package of an index, as {EXAMPLE}")
    return str(requirement)


PackageRequirement = Annotated[str, Field(max_length=500), AfterValidator(_from_an_index)]
Requirements = Annotated[tuple[PackageRequirement, ...], Field(max_length=100)]
