"""Services, clusters and the command as processes of their own, and waiting for what they do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "tasks.py"
BROUGHT = TASKS.with_name("brought.py")
EXAMPLES = Path(__file__).parent.parent.parent / "examples"
NUM_CPUS = 8

# A shell's background job ignores Ctrl-C, and so would its children: these do not.
LISTEN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
COMMAND = [sys.executable, "-c", f"{LISTEN}; from steepest.cli import main; main()"]
# For a Ray cluster of the test's own.
RAY_ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


_NODES = """
import json, sys
from ray.cluster_utils import Cluster
head, *others = json.loads(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args=head)
for node in others:
    cluster.add_node(**node)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@contextlib.contextmanager
def raylets(nodes: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The address of a cluster of several raylets. nodes: what each is started with."""
    process = subprocess.Popen(
        [sys.executable, "-c", _NODES, json.dumps(nodes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=RAY_ENVIRONMENT,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line[0].isdigit():
            break
    yield line.strip()
    process.communicate("")


@contextlib.contextmanager
def serving(
    directory: Path,
    *options: str,
    prefix: Sequence[str] = (),
    ending: signal.Signals = signal.SIGINT,
    first: str = "",
) -> Iterator[str]:
    """The address of a service in a process of its own, which gets the signal at the end; Ctrl-C must end it well.

    first: Python that it runs before all else.
    """
    command = [*COMMAND[:2], f"{first}\n{COMMAND[2]}"]
    process = subprocess.Popen(
        [*prefix, *command, "serve", "--port", "0", "--http-port", "0", "--data-dir", str(directory), *options],
        stderr=subprocess.PIPE,
        text=True,
        env=RAY_ENVIRONMENT if "--ray-address" in options else None,
    )
    assert process.stderr is not None
    lines = [process.stderr.readline(), process.stderr.readline()]
    assert lines[1] == "ready\n", lines
    try:
        yield lines[0].split()[1]
    finally:
        process.send_signal(ending)
        said = process.communicate(timeout=60)[1]
    if ending == signal.SIGINT:
        assert process.returncode == 0, (process.returncode, said)


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait for something to become true, and return it."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return value
