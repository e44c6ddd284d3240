"""What a benchmark found, as a JSON file that says when and on what it was measured."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def write_report(path: Path, **found: Any) -> None:
    """Write `found`, with the date, the machine and the version of PyTorch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    where = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": version("torch"),
    }
    path.write_text(json.dumps({**where, **found}, indent=2) + "\n")
