"""What all tests share."""

from __future__ import annotations

import os
import shutil

# Ray forks while gRPC's threads run; gRPC's own fork handlers would crash its children.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import pytest
from hypothesis import settings

settings.register_profile("steepest", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("steepest")


def need_program(name: str, package: str) -> str:
    """Where a system program is; without it the test skips, naming the package, or fails under CI."""
    path = shutil.which(name)
    if path is None:
        message = f"the system package {package!r} is missing (it has {name})"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path
