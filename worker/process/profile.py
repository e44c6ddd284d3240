"""A trace of some steps of one worker by torch.profiler, as Chrome's and Perfetto's viewers read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steepest.telemetry_spec import TelemetrySpec


class Profile:
    """Records the steps that the spec says. directory: beside the job's checkpoints."""

    def __init__(self, spec: TelemetrySpec, worker: str, directory: Path) -> None:
        self._steps = range(spec.profile_start, spec.profile_start + spec.profile_steps)
        self._path = directory / "profiles" / f"{worker}-steps-{self._steps.start}-{self._steps.stop - 1}.json.gz"
        self._profiler: Any = None

    def begin(self, step: int) -> None:
        """A worker is about to compute for this step. Says on stdout, and so in the job's log, what it has written."""
        if self._profiler is None and step in self._steps:
            import torch

            self._profiler = torch.profiler.profile(record_shapes=True)  # of all devices that there are
            self._profiler.start()
        elif self._profiler is not None and step >= self._steps.stop:
            self.end()

    def end(self) -> None:
        """Write what there is."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        self._steps = range(0)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._path))
        except (OSError, RuntimeError) as error:
            print(f"the profile could not be written to {self._path}: {error}")  # for the job's log
        else:
            print(f"profile written to {self._path}")
