"""What all tests share."""

from __future__ import annotations

import os

# Ray forks while gRPC's threads run; gRPC's own fork handlers would crash its children.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import pytest
from hypothesis import settings

settings.register_profile("steepest", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("steepest")

# Files whose tests start a service in a process of its own.
STARTS_RAY = {
    "test_train.py",
    "test_restart.py",
    "test_prometheus.py",
    "test_compression.py",
    "test_gpus.py",
    "test_access.py",
}
SERVICE = {"service", "client", "submit", "cluster"}  # fixtures of tests that start Ray


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n 2`, tests that start Ray run one after another in one process, all other files in the other."""
    for item in items:
        starts_ray = SERVICE & set(getattr(item, "fixturenames", ())) or item.path.name in STARTS_RAY
        item.add_marker(pytest.mark.xdist_group("ray" if starts_ray else str(item.path)))
