"""What all tests share."""

from __future__ import annotations

import os

# Ray forks while gRPC's threads run; gRPC's own fork handlers would crash its children.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

from hypothesis import settings

settings.register_profile("steepest", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("steepest")
