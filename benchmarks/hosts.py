"""Several hosts on one machine: network namespaces, joined by a switch, with links that can be slowed down.

Needs root and Debian's iproute2. Processes of one host enter its namespace, and find another network there; ps.host
tells them apart by it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET = 0x40000000


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Host:
    """A network namespace with one interface, eth0."""

    namespace: str
    address: str

    @property
    def prefix(self) -> list[str]:
        """What to put before a command to run it there."""
        return ["ip", "netns", "exec", self.namespace]

    def enter(self) -> None:
        """Move this thread, and all that it starts from now on, to this host."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path(f"/run/netns/{self.namespace}").open() as namespace:
            if libc.setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.namespace}")

    def traffic(self) -> tuple[int, int]:
        """(bytes received, bytes sent) by its interface so far."""
        lines = subprocess.run(
            [*self.prefix, "cat", "/proc/net/dev"], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        numbers = next(line.split(":")[1].split() for line in lines if line.strip().startswith("eth0:"))
        return int(numbers[0]), int(numbers[8])

    def limit(self, rate: str) -> None:
        """Limit what it sends. rate: in tc's words, such as 100mbit; empty: no limit."""
        tc = [*self.prefix, "tc", "qdisc"]
        subprocess.run([*tc, "del", "dev", "eth0", "root"], check=False, capture_output=True)
        if rate:
            shape = ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
            subprocess.run([*tc, "add", "dev", "eth0", "root", *shape], check=True)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts that reach each other; they are gone at the end."""
    mark = secrets.token_hex(3)
    switch = f"steepest-{mark}"
    network = f"10.213.{os.getpid() % 256}"
    made = [Host(f"steepest-{mark}-{number}", f"{network}.{number + 1}") for number in range(count)]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for number, host in enumerate(made):
            port = f"port{number}"
            _ip("netns", "add", host.namespace)
            _ip("link", "add", port, "netns", switch, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("-n", switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for interface in ("eth0", "lo"):
                _ip("-n", host.namespace, "link", "set", interface, "up")
        yield made
    finally:
        for namespace in [*(host.namespace for host in made), switch]:
            subprocess.run(["ip", "netns", "del", namespace], check=False, stderr=subprocess.DEVNULL)
