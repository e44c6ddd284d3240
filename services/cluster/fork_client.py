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
from collections.abc import Sequence

ANSWER_SECONDS = 10.0
LENGTH_BYTES = PID_BYTES = 8
STANDARD_STREAMS = (0, 1, 2)
GO = b"g"


def ask(name: str, command: list[str], streams: Sequence[int] = STANDARD_STREAMS) -> int:
    """The pid of a fork of the server of that name that runs the command; 0 when there is none.

    command: a script and its arguments, or "-m", a module and its arguments. streams: the fork's standard input, output
    and error.
    """
    try:
        request = {"command": command, "environment": dict(os.environ), "directory": os.getcwd()}  # noqa: PTH109
        data = json.dumps(request).encode()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect("\0" + name)
            socket.send_fds(connection, [len(data).to_bytes(LENGTH_BYTES, "little")], streams)
            connection.sendall(data)
            pid = int.from_bytes(connection.recv(PID_BYTES, socket.MSG_WAITALL), "little")
            if pid:
                connection.sendall(GO)  # the fork ends if this does not come: nothing is started twice
            return pid
    except OSError:
        return 0


def main() -> None:
    """Entry point of the process."""
    name, *command = sys.argv[1:]
    if not ask(name, command):
        os.execv(sys.executable, [sys.executable, *command])  # noqa: S606


if __name__ == "__main__":
    main()
