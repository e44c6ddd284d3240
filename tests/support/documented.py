"""The messages of docs/operations.md, against what really was said."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

OPERATIONS = Path(__file__).parent.parent.parent / "docs" / "operations.md"
BEGIN, END = "<!-- messages: each is produced by a test -->", "<!-- end of messages -->"


@cache
def documented_messages() -> dict[str, list[str]]:
    """By what fails, the messages that users see; … stands for what differs."""
    table = OPERATIONS.read_text().split(BEGIN)[1].split(END)[0]
    rows = [line.strip("|").split("|") for line in table.strip().splitlines()[2:]]
    return {row[0].strip(): re.findall("`([^`]+)`", row[1]) for row in rows}


def is_documented(failure: str, said: str) -> bool:
    """Whether all messages of a failure are in what was said."""
    for message in documented_messages()[failure]:
        pattern = ".*?".join(map(re.escape, message.split("…")))
        assert re.search(pattern, said, re.DOTALL), f"{message!r} is in the docs, and this was said:\n{said}"
    return True
