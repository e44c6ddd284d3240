"""Writes the descriptions of the spec's fields to where people read them: docs/jobs.md and the .proto file.

`python -m steepest.cli.reference` in the repository's root; with --check it only says what is out of date. The options'
help is made from the same descriptions when the command starts.
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

from steepest import spec, step_spec
from steepest.cli.options import FLAG_OF_PATH
from steepest.spec_fields import describe_fields

DOCS = Path("docs/jobs.md")
PROTO = Path("proto/steepest/v1/training_jobs.proto")
BEGIN, END = "<!-- fields: written by `make reference` -->", "<!-- end of fields -->"
MESSAGES = (
    "TaskReference",
    "DataSpec",
    "OptimizerSpec",
    "ScheduleSpec",
    "AutoClipSpec",
    "ZClipSpec",
    "AdaGcSpec",
    "AgcSpec",
    "ClipSpec",
    "SyncSpec",
    "CompressionSpec",
    "AverageSpec",
    "MemorySpec",
    "HealthSpec",
    "TelemetrySpec",
    "PlacementSpec",
    "ChangeSpec",
    "TrainingJobSpec",
)
WIDTH = 116


def table() -> str:
    """The fields as a Markdown table."""
    rows = ["| field | option | meaning | default |", "|---|---|---|---|"]
    for field in describe_fields():
        flag = FLAG_OF_PATH.get(field.path)
        option = f"`{flag}`" if flag else ""
        rows.append(f"| `{field.path}` | {option} | {field.description} | {field.default} |")
    return "\n".join(rows)


def docs(text: str) -> str:
    """docs/jobs.md with the table as it should be."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def proto(text: str) -> str:
    """The .proto file with the comments of the spec's fields as they should be."""
    optimizer = {
        info.path.split(".")[1]: info.description for info in describe_fields() if info.path.startswith("optimizer.")
    }
    descriptions = {"OptimizerSpec": optimizer}
    for name in MESSAGES:
        found = re.search(rf"^message {name} {{\n(.*?)^}}", text, re.MULTILINE | re.DOTALL)
        if found is None:
            raise ValueError(f"{PROTO} has no message {name}")
        fields = descriptions.get(name) or {
            field: info.description or ""
            for field, info in (getattr(spec, name, None) or getattr(step_spec, name)).model_fields.items()
        }
        lines = []
        for line in found[1].splitlines():
            stripped = line.strip()
            if stripped.startswith("//"):
                continue
            field = re.search(r"(\w+) = \d+;", stripped)
            if field is not None:
                lines += [f"  // {part}" for part in textwrap.wrap(fields[field[1]], WIDTH)]
            lines.append(line)
        text = text[: found.start(1)] + "\n".join(lines) + "\n" + text[found.end(1) :]
    return text


def main(*, check: bool) -> int:
    """Write both, or say which is out of date."""
    stale = 0
    for path, make in ((DOCS, docs), (PROTO, proto)):
        before = path.read_text()
        after = make(before)
        if after == before:
            continue
        stale += 1
        if check:
            sys.stderr.write(f"{path} is out of date: run `make reference`\n")
        else:
            path.write_text(after)
    return stale if check else 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
