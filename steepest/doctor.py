"""Examines a machine, a service and a cluster for `steepest doctor`."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from steepest import contexts
from steepest.errors import SteepestError

NEEDED = ("torch", "ray", "numba", "safetensors", "sqlalchemy", "alembic", "pyarrow", "starlette", "uvicorn")
LEAST_DISK_BYTES, LEAST_MEMORY_BYTES = 2 << 30, 2 << 30
PORTS = {"grpc": ("50051", "--port"), "http": ("8080", "--http-port")}


class Check(NamedTuple):
    """status: ok, warn or fail. cure: what to do, if anything."""

    name: str
    status: str
    message: str
    cure: str = ""


def examine(server: str, ray_address: str | None) -> list[Check]:
    """All checks in order."""
    return [*_packages(), *_machine(), *_gpu(), _service(server), *_cluster(ray_address)]


def _packages() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Check("python", "ok", f"{version} at {sys.executable}")
    missing = []
    for package in NEEDED:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        message = f"missing: {', '.join(missing)}; the client works, train and serve do not"
        yield Check("packages", "fail", message, "pip install 'steepest[server]'")
    else:
        found = ", ".join(f"{package} {metadata.version(package)}" for package in ("torch", "ray"))
        yield Check("packages", "ok", f"steepest {metadata.version('steepest')}, {found}")


def _machine() -> Iterator[Check]:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Check("cpus", "ok" if cpus > 1 else "warn", f"{cpus} here", "" if cpus > 1 else _ONE_CPU)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    enough = free >= LEAST_MEMORY_BYTES
    cure = "" if enough else "each process of a job takes about 0.4 GB besides model and data: end something else"
    yield Check("memory", "ok" if enough else "warn", f"{free / 1e9:.1f} GB are free", cure)
    for name, path in (("disk", Path.cwd()), ("temporary", Path(tempfile.gettempdir()))):
        try:
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            yield Check(name, "fail", f"{path} cannot be written to: {error.strerror}", "work in another directory")
            continue
        room = shutil.disk_usage(path).free
        enough = room >= LEAST_DISK_BYTES
        cure = "" if enough else "checkpoints need three times the model and its optimizer state: make room"
        yield Check(name, "ok" if enough else "warn", f"{room / 1e9:.1f} GB are free in {path}", cure)
    yield _shared_memory()


_ONE_CPU = "workers and servers will take turns; more CPUs are faster"


def _shared_memory() -> Check:
    """Workers and servers of a host share anonymous memory, which they pass to each other through /proc."""
    try:
        descriptor = os.memfd_create("steepest-doctor")
    except (AttributeError, OSError) as error:
        cure = "use --set placement.transport=inline, which copies instead"
        return Check("shared memory", "fail", f"cannot be had: {error}", cure)
    try:
        with Path(f"/proc/{os.getpid()}/fd/{descriptor}").open("r+b"):
            return Check("shared memory", "ok", "processes can share it")
    except OSError as error:
        cure = "mount /proc, or use --set placement.transport=inline"
        return Check("shared memory", "fail", f"cannot be passed on: {error}", cure)
    finally:
        os.close(descriptor)


def _gpu() -> Iterator[Check]:
    try:
        import torch
    except ImportError:
        return
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        yield Check("gpu", "ok", f"{names}; jobs use it with --device cuda")
    else:
        yield Check("gpu", "ok", "none that torch can use; jobs run on CPUs")


def _service(server: str) -> Check:
    from steepest.client import Client

    server = server or contexts.read().address
    try:
        with Client(server) as client:
            count = sum(1 for _ in client.list())
        return Check("service", "ok", f"answers at {server}; it has {count} jobs")
    except SteepestError as error:
        taken = [f"{port} ({option})" for port, option in PORTS.values() if _is_taken(int(port))]
        if taken:
            cure = f"another program has the port {' and '.join(taken)}: end it, or give the service another"
            return Check("service", "warn", str(error), cure)
        return Check("service", "warn", f"none at {server}", "steepest serve starts one; steepest train needs none")


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _cluster(address: str | None) -> Iterator[Check]:
    if address is None:
        return
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        cure = "give the head node's, as ray start printed it"
        yield Check("ray", "fail", f"--ray-address {address} is no HOST:PORT", cure)
        return
    with socket.socket() as probe:
        probe.settimeout(3)
        if probe.connect_ex((host, int(port))) == 0:
            yield Check("ray", "ok", f"something answers at {address}")
        else:
            yield Check("ray", "fail", f"nothing answers at {address}", "ray start --head --port=6379 on the head node")
