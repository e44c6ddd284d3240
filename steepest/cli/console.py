"""What a person sees while a job runs. All of it goes to stderr; stdout is for results."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from steepest.jobs import SUBMISSION, Event, JobInfo, LogLine
from steepest.jobs import Progress as StepProgress

if TYPE_CHECKING:
    from ps.job.footprint import Footprint

SPARK_STEPS = 20  # that the line of losses shows, and that are looked at for what holds steps up
BARS = "▁▂▃▄▅▆▇█"
LINE_SECONDS = 2.0  # between lines of progress where stderr is no terminal


class JobDisplay:
    """Shows updates of one job: a live bar on a terminal, a line every now and then elsewhere."""

    def __init__(self, job: str, total_steps: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._total = total_steps
        self._job = job
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0
        self._seen: tuple[float, int] | None = None
        self._rate = 0.0
        self._recent: deque[StepProgress] = deque(maxlen=SPARK_STEPS)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=False,
            )
            self._bar.start()
            self._task = self._bar.add_task("step", total=self._total, numbers="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def update(self, update: Event | StepProgress | LogLine) -> None:
        """Show what happened."""
        if isinstance(update, Event):
            self.say(f"{self._job} {update.state}: {update.reason}")
        elif isinstance(update, LogLine):
            if update.process != SUBMISSION:  # the workers print it again
                self.say(log_line(update))
        else:
            self._progress(update)

    def _progress(self, progress: StepProgress) -> None:
        if self._seen is not None and progress.time > self._seen[0]:
            steps = (progress.step - self._seen[1]) / (progress.time - self._seen[0])
            self._rate = steps if not self._rate else 0.7 * self._rate + 0.3 * steps
        self._seen = (progress.time, progress.step)
        samples = f"{self._rate * progress.samples:,.0f} samples/s" if self._rate else ""
        clipped = "" if math.isclose(progress.clipped_norm, progress.gradient_norm) else f"→{progress.clipped_norm:.3g}"
        logged = "".join(f"  {name} {value:.4g}" for name, value in progress.logged.items())
        import numpy as np  # here, for commands that show no progress start sooner without it

        from steepest.bottleneck import COLUMNS, bottleneck

        self._recent.append(progress)
        found = bottleneck({name: np.array([getattr(p, name) for p in self._recent]) for name in COLUMNS})
        held = "" if found is None or found.word == "compute-bound" else f"  {found.word}, {found.saves_share:.0%}"
        loss = f"{spark([p.loss for p in self._recent])} {progress.loss:.4g}"
        numbers = f"loss {loss}{logged}  |g| {progress.gradient_norm:.3g}{clipped}  {samples}{held}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=progress.step, numbers=numbers)
            return
        if time.monotonic() - self._last_line < LINE_SECONDS and progress.step < self._total:
            return
        self._last_line = time.monotonic()
        left = f"  ETA {(self._total - progress.step) / self._rate:.0f} s" if self._rate else ""
        self.say(f"step {progress.step}/{self._total}  {numbers}{left}")


def spark(values: Sequence[float]) -> str:
    """Numbers as a line of bars, the least the lowest; what is not finite is a gap."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    width = high / 2 - low / 2 or 1.0  # halves, for the range of numbers is twice the largest
    return "".join(
        BARS[round((len(BARS) - 1) * ((v / 2 - low / 2) / width))] if math.isfinite(v) else " " for v in values
    )


def log_line(line: LogLine) -> str:
    """What user code printed, with who did."""
    return f"{line.process} | {line.text}"


def show(job: str, total_steps: int, updates: Iterable[Event | StepProgress | LogLine | JobInfo]) -> JobInfo | None:
    """Show all updates of a job and return the last one, its end."""
    with JobDisplay(job, total_steps) as display:
        for update in updates:
            if isinstance(update, JobInfo):
                return update
            display.update(update)
    return None


def summary(info: JobInfo) -> str:
    """The end of a job in a few lines."""
    lines = [f"{info.job} {info.state} at step {info.step} of {info.total_steps} after {info.wall_seconds:.1f} s"]
    if not info.has_ended:
        lines.append(f"  {info.reason}")
    if info.loss is not None:
        lines.append(f"  loss {info.loss:.6g} (last training step)")
    lines += [f"  evaluation: {name} {value:.6g}" for name, value in sorted(info.metrics.items())]
    if info.samples_per_second:
        lines.append(f"  {info.samples_per_second:,.0f} samples/s")
    if info.parameters_sha256:
        lines.append(f"  parameters_sha256 {info.parameters_sha256}")
    if info.error:
        lines.append(f"  error: {info.error}")
    return "\n".join(lines)


def show_plan(needed: Footprint, available: int) -> None:
    """What a job would take, as a table on stderr."""
    table = Table(title=f"{needed.num_parameters:,} parameters")
    columns = ["process", "parameters", "gradients", "optimizer state", "network a step"]
    for column in [*columns, "on its GPU"] if needed.gpu else columns:
        table.add_column(column, justify="left" if column == "process" else "right")
    for index, server in enumerate(needed.servers):
        own = [server.parameters, server.received, server.optimizer_state, server.pushed + server.pulled, server.gpu]
        table.add_row(f"server-{index}", *map(_size, own[: len(table.columns) - 1]))
    for index, worker in enumerate(needed.workers):
        traffic = _size(worker.pushed + worker.pulled)
        gradients = _size(worker.gradients + worker.residuals)
        gpu = [_size(worker.gpu)] if needed.gpu else []
        table.add_row(f"worker-{index}", _size(worker.parameters), gradients, "", traffic, *gpu)
    table.add_row("checkpoint", _size(needed.checkpoint), "", "", "")
    console = Console(stderr=True)
    console.print(table)
    gpus = f", and {_size(needed.gpu)} on GPUs" if needed.gpu else ""
    console.print(
        f"{_size(needed.total)} in all, of {_size(available)}{gpus}; besides, what the model's activations and data "
        "take, and about 0.4 GB for each process"
    )


def _size(count: int) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B" if count else "-"


def complain(message: str) -> None:
    """An error, on stderr."""
    sys.stderr.write(f"error: {message}\n")
