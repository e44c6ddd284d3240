"""System programs that tests need."""

from __future__ import annotations

import os
import shutil

import pytest


def need_program(name: str, package: str) -> str:
    """Where a system program is; without it the test skips, naming the package, or fails under CI."""
    path = shutil.which(name)
    if path is None:
        message = f"the system package {package!r} is missing (it has {name})"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path
