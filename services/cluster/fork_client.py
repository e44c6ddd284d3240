"""Has the fork server of this host become a Ray worker: `python -I -S fork_client.py SOCKET SCRIPT [ARGUMENT...]`.

Ray runs this as the Python interpreter of a worker. It passes on the arguments, environment, directory and standard
streams it was given, and ends; without an answer it becomes that worker itself, by a plain start. It imports little,
for it runs once for every process. SOCKET is a name in Linux's abstract namespace.
"""

from __future__ import annotations

import json
import os
import socket
import sys

ANSWER_SECONDS = 10.0
LENGTH_BYTES = 8
STANDARD_STREAMS = (0, 1, 2)
READY, GO = b"r", b"g"


def ask(name: str, command: list[str]) -> bool:
    """Whether a fork of the server of that name runs the command."""
    try:
        request = {"command": command, "environment": dict(os.environ), "directory": os.getcwd()}  # noqa: PTH109
        data = json.dumps(request).encode()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect("\0" + name)
            socket.send_fds(connection, [len(data).to_bytes(LENGTH_BYTES, "little")], STANDARD_STREAMS)
            connection.sendall(data)
            if connection.recv(1) != READY:
                return False
            connection.sendall(GO)  # the fork ends if this does not come: nothing is started twice
            return True
    except OSError:
        return False


def main() -> None:
    """Entry point of the process."""
    name, *command = sys.argv[1:]
    if not ask(name, command):
        os.execv(sys.executable, [sys.executable, *command])  # noqa: S606


if __name__ == "__main__":
    main()
