"""Going back to a checkpoint from before a finding, with a smaller learning rate."""

from __future__ import annotations

import shutil
from pathlib import Path

from ps.checkpoint.files import checkpoints, step_of


def discard_after(directory: Path, step: int) -> None:
    """Remove the checkpoints of later steps than that, for those steps are undone."""
    for path in checkpoints(directory):
        if step_of(path) > step:
            shutil.rmtree(path, ignore_errors=True)  # a server may have been removing it, too
