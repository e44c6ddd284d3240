"""The parts of the job spec that set environment variables of a task's code."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

# Read before a task's code is there, or what workers are set up with: too late for the one, and harm to the other.
RESERVED = (
    "PYTHON", "LD_", "MALLOC_", "GLIBC_", "OMP_", "MKL_", "KMP_", "OPENBLAS_", "NUMBA_", "GRPC_", "RAY_", "STEEPEST_",
    "TORCH_", "PYTORCH_", "CUDA_", "NVIDIA_", "CUBLAS_",
)  # fmt: skip
RESERVED_NAMES = ("PATH", "HOME", "TMPDIR")


def _not_reserved(name: str) -> str:
    if name in RESERVED_NAMES or name.startswith(RESERVED):
        raise ValueError(
            f"{name} is read before a task's code runs, or is how steepest sets up its processes: set it where the "
            "service and Ray are started"
        )
    return name


Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,126}$"), AfterValidator(_not_reserved)]
Value = Annotated[str, Field(max_length=32_768, pattern=r"^[^\x00]*$")]
SecretName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$")]
Variables = Annotated[dict[Name, Value], Field(max_length=256)]
SecretVariables = Annotated[dict[Name, SecretName], Field(max_length=64)]
