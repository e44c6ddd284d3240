"""The allocator of the processes of jobs: jemalloc, from the library that Ray brings along."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

# Pages of 2 MiB where the system gives them on demand, so that a fresh tensor costs few page faults; and few arenas, as
# each has such pages of its own.
OPTIONS = "thp:always,narenas:2"


def allocator_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that have a new process use jemalloc; none where there is no such library, or a user preloads one.

    Measured by benchmarks/activations.py and step_time.py.
    """
    found = importlib.util.find_spec("ray")
    folders = [] if found is None else found.submodule_search_locations or []
    libraries = [path for folder in folders if (path := Path(folder) / "core" / "libjemalloc.so").is_file()]
    if not libraries or "LD_PRELOAD" in environment:
        return {}
    return {"LD_PRELOAD": str(libraries[0]), "MALLOC_CONF": environment.get("MALLOC_CONF", OPTIONS)}
