"""Several hosts on one machine: network namespaces, joined by a switch, with links that can be slowed down.

Needs root and Debian's iproute2. Processes of one host enter its namespace and find another network there, by which
ps.memory.host tells them apart. A process that holds every frame for a while makes the delay (`python hosts.py` is such
a cable), because not every kernel has the netem module.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import secrets
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h
FRAME_BYTES = 9_000  # of a delayed cable, where every frame costs a Python call


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _enter(namespace: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/run/netns/{namespace}").open() as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


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
        _enter(self.namespace)

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


def _tap(namespace: str, name: str) -> int:
    """An interface whose frames this process reads and writes."""
    _enter(namespace)
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH14x", name.encode(), IFF_TAP | IFF_NO_PI))
    return descriptor


def cable(ends: tuple[int, int], seconds: float) -> None:
    """Carry frames between two interfaces, each for so long."""
    way = {ends[0]: ends[1], ends[1]: ends[0]}
    under_way: deque[tuple[float, int, bytes]] = deque()  # due, end, frame
    poll = select.poll()
    for end in ends:
        poll.register(end, select.POLLIN)
    while True:
        wait = (under_way[0][0] - time.monotonic()) * 1e3 if under_way else None
        for end, _ in poll.poll(None if wait is None else max(0.0, wait)):
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame = os.read(end, FRAME_BYTES + 64)
                    under_way.append((time.monotonic() + seconds, way[end], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, end, frame = under_way.popleft()
            with contextlib.suppress(OSError):  # as a cable loses what comes to an interface that is down
                os.write(end, frame)


@contextlib.contextmanager
def hosts(count: int, round_trip_seconds: float = 0.0) -> Iterator[list[Host]]:
    """So many hosts that reach each other; they are gone at the end.

    round_trip_seconds: how long a frame and the answer to it are under way.
    """
    mark = secrets.token_hex(3)
    switch = f"steepest-{mark}"
    network = f"10.213.{os.getpid() % 256}"
    made = [Host(f"steepest-{mark}-{number}", f"{network}.{number + 1}") for number in range(count)]
    cables: list[subprocess.Popen[str]] = []
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for number, host in enumerate(made):
            port = f"port{number}"
            _ip("netns", "add", host.namespace)
            if round_trip_seconds:
                cables.append(_start_cable(host.namespace, switch, port, round_trip_seconds / 4))
            else:
                veth = ["type", "veth", "peer", "name", "eth0", "netns", host.namespace]
                _ip("link", "add", port, "netns", switch, *veth)
            _ip("-n", switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for interface in ("eth0", "lo"):
                _ip("-n", host.namespace, "link", "set", interface, "up")
        yield made
    finally:
        for process in cables:
            process.kill()
            process.communicate()
        for namespace in [*(host.namespace for host in made), switch]:
            subprocess.run(["ip", "netns", "del", namespace], check=False, stderr=subprocess.DEVNULL)


def _start_cable(namespace: str, switch: str, port: str, seconds: float) -> subprocess.Popen[str]:
    """A delayed cable from eth0 of a host to a port of the switch."""
    command = [sys.executable, __file__, namespace, switch, port, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "up\n":
        raise RuntimeError(f"no cable to {namespace}: is there a /dev/net/tun?")
    for place, interface in ((namespace, "eth0"), (switch, port)):
        _ip("-n", place, "link", "set", interface, "mtu", str(FRAME_BYTES))
    return process


if __name__ == "__main__":
    taps = (_tap(sys.argv[1], "eth0"), _tap(sys.argv[2], sys.argv[3]))
    print("up", flush=True)
    cable(taps, float(sys.argv[4]))
