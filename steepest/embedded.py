"""Starts the service in this process: the one place where the client library reaches into the server's rooms."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steepest.errors import ServiceUnavailableError

if TYPE_CHECKING:
    from ps.job.footprint import Footprint
    from services.jobs.task_probe import TaskDescription
    from services.service import Service
    from services.store.tokens import Tokens
    from steepest.bundle import Bundle
    from steepest.serve_settings import ServeSettings
    from steepest.spec import TrainingJobSpec


def describe_task(bundle: Bundle, spec: TrainingJobSpec) -> tuple[TrainingJobSpec, TaskDescription]:
    """(the spec with what the task settles, what a rehearsal found), starting nothing but that.

    Secrets are those of STEEPEST_SECRETS_DIR. Raises SpecError for what any service would refuse.
    """
    from services.cluster.fork_server import REHEARSAL, ForkServer
    from services.jobs.agreement import check_agreement
    from services.jobs.secret_files import SecretFiles
    from services.jobs.task_probe import TaskProbe
    from services.settings import Settings

    directory = os.environ.get("STEEPEST_SECRETS_DIR")
    secrets = SecretFiles(Path(directory) if directory else None).of(spec, owner="")
    with _unpacked(bundle, spec) as code, contextlib.closing(ForkServer([REHEARSAL])) as forks:
        description = TaskProbe(forks).describe(spec, code, Settings.probe_timeout_seconds, secrets)
    spec = description.completed(spec)
    check_agreement(spec, description)
    return spec, description


@contextlib.contextmanager
def _unpacked(bundle: Bundle, spec: TrainingJobSpec) -> Iterator[Path | None]:
    """A folder with the code and the packages it requires; None where there is neither. Raises SpecError."""
    from ps.job.code import unpack_code
    from services.jobs.packages import with_packages
    from services.settings import Settings

    seconds, max_bytes = Settings.probe_timeout_seconds, Settings.max_code_bytes
    code = with_packages(bundle.data, spec.requirements, seconds=seconds, max_bytes=max_bytes).code
    with tempfile.TemporaryDirectory(prefix="steepest-code-") as directory:
        yield unpack_code(code, Path(directory)) if code else None


def plan_job(bundle: Bundle, spec: TrainingJobSpec) -> tuple[Footprint, int, str]:
    """(what the job needs on this machine, the memory there is, why it cannot fit), starting nothing but a probe.

    Raises SpecError when the task cannot be loaded.
    """
    from ps.job.config import layout_of
    from ps.job.footprint import explain_refusal, footprint

    spec, description = describe_task(bundle, spec)
    layout = layout_of(description.model, spec)
    needed, available = footprint(spec, layout, num_hosts=1), machine_memory()
    return needed, available, explain_refusal(needed, available)


def machine_memory() -> int:
    """Bytes of memory that this machine, or the container around this process, has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


@contextlib.contextmanager
def tokens_of(data_directory: Path, database: str = "") -> Iterator[Tokens]:
    """The tokens of the service that keeps its jobs there, whether it runs or not. database: its URL, if it has one.

    Raises ServiceUnavailableError.
    """
    try:
        from services.settings import Settings
        from services.store.store import Store
    except ModuleNotFoundError as error:
        raise _without(error) from error
    try:
        data_directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ServiceUnavailableError(f"cannot use the data directory {data_directory}: {error.strerror}") from error
    with contextlib.closing(Store(Settings(data_directory=data_directory, database=database).database_url)) as store:
        yield store.tokens


def serve_settings(config: Path | None, given: Mapping[str, Any]) -> ServeSettings:
    """See steepest.serve_settings. Raises ServiceUnavailableError, too."""
    try:
        from steepest.serve_settings import read_settings
    except ModuleNotFoundError as error:
        raise _without(error) from error
    return read_settings(config, dict(given))


def _without(error: ModuleNotFoundError) -> ServiceUnavailableError:
    return ServiceUnavailableError(f"the service needs the package {error.name!r}: pip install 'steepest[server]'")


@contextlib.contextmanager
def running_service(data_directory: Path, **settings: Any) -> Iterator[Service]:
    """A service, stopped at the end. settings: fields of services.settings.Settings.

    Raises ServiceUnavailableError when a port is taken or the server's packages are not installed.
    """
    try:
        from services.cluster.fork_server import ForkServer
        from services.cluster.ray_environment import follow_cluster_authentication, prepare_ray_environment

        if settings.get("ray_address"):
            follow_cluster_authentication()  # before anything imports ray
        prepare_ray_environment()
        forks = ForkServer()
        forks.start_early()  # it imports in its own process what this one imports meanwhile
        from services.service import Service
        from services.settings import Settings
    except ModuleNotFoundError as error:
        raise _without(error) from error
    try:
        service = Service(Settings(data_directory=data_directory, **settings), forks)
    except OSError as error:
        forks.close()
        raise ServiceUnavailableError(f"the service cannot start: {error}") from error
    try:
        yield service
    finally:
        service.stop()
