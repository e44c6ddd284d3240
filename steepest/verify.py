"""Whether a checkpoint that was downloaded is as it was written. Needs neither torch nor a service."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def verify_checkpoint(directory: Path) -> dict[str, Any]:
    """valid; problems: a sentence for each; step, files, parameters_sha256, state_sha256: of the manifest, or None."""
    found: dict[str, Any] = dict.fromkeys(("step", "files", "parameters_sha256", "state_sha256"))
    problems: list[str] = []
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        hashes = {str(name): str(entry["sha256"]) for name, entry in manifest["files"].items()}
        found |= {name: manifest[name] for name in ("step", "parameters_sha256", "state_sha256")}
        found["files"] = len(hashes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        hashes = {}
        problems.append(f"{directory / MANIFEST}: is no manifest of a checkpoint: {error!r}")
    for name, expected in hashes.items():
        path = directory / name
        if Path(name).name != name:
            problems.append(f"{directory / MANIFEST}: {name!r} is no file of this directory")
            continue
        try:
            with path.open("rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
            continue
        if actual != expected:
            problems.append(f"{path}: its SHA-256 is not the one in the manifest, so it is not as it was written")
    return {"valid": not problems, "problems": problems, **found}
