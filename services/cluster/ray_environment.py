"""Environment variables that Ray reads when it is imported."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path


def prepare_ray_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """No usage statistics, and an explicit authentication mode; what the user has set stays."""
    environment.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    environment.setdefault("RAY_AUTH_MODE", "token")
    # Processes come from the fork server; those that an embedded Ray would start in advance are never used.
    environment.setdefault("RAY_prestart_worker_first_driver", "0")
    # A plain kill is a way to stop the service, and no reason for a crash report.
    environment.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    # Ray is to leave CUDA_VISIBLE_DEVICES alone in actors without a GPU.
    environment.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def follow_cluster_authentication(environment: MutableMapping[str, str] = os.environ) -> None:
    """For an existing cluster: the mode that `ray start` chose, which is `token` where there is a token."""
    has_token = (
        "RAY_AUTH_TOKEN" in environment
        or Path(environment.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token")).exists()
    )
    environment.setdefault("RAY_AUTH_MODE", "token" if has_token else "disabled")
