"""Starts the service in this process: the one place where the client library reaches into the server's rooms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steepest.errors import ServiceUnavailableError

if TYPE_CHECKING:
    from services.service import Service


@contextlib.contextmanager
def running_service(data_directory: Path, **settings: Any) -> Iterator[Service]:
    """A service, stopped at the end. settings: fields of services.settings.Settings.

    Raises ServiceUnavailableError when a port is taken or the server's packages are not installed.
    """
    try:
        from services.ray_environment import follow_cluster_authentication

        if settings.get("ray_address"):
            follow_cluster_authentication()  # before anything imports ray
        from services.service import Service
        from services.settings import Settings
    except ModuleNotFoundError as error:
        raise ServiceUnavailableError(
            f"the service needs the package {error.name!r}: pip install 'steepest[server]'"
        ) from error
    try:
        service = Service(Settings(data_directory=data_directory, **settings))
    except OSError as error:
        raise ServiceUnavailableError(f"the service cannot start: {error}") from error
    try:
        yield service
    finally:
        service.stop()
