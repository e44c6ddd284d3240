"""What the figures of the gallery share: the digits, and how they are run and drawn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sklearn.datasets import load_digits
from torch import nn

import steepest
from steepest.errors import JobFailedError

if TYPE_CHECKING:
    from steepest.records import Records


def digits() -> steepest.ArrayData:
    """1,797 images of handwritten digits, 64 numbers of mean 0 and standard deviation 1 each, and their classes."""
    images, classes = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32)
    return steepest.ArrayData((inputs - inputs.mean()) / inputs.std(), torch.tensor(classes))


def classifier(model: nn.Module) -> steepest.Task:
    """Tells digits apart."""
    return steepest.Task(model=model, loss=nn.CrossEntropyLoss(), train_data=digits())


class Runs:
    """Runs jobs on a service, side by side as far as it has room. jobs, steps: how many there were."""

    def __init__(self, client: steepest.Client) -> None:
        self._client = client
        self.jobs = self.steps = 0

    def all(
        self, function: Callable[..., Any], cases: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]
    ) -> list[tuple[steepest.JobInfo, Records]]:
        """What became of a task with these (arguments, specs), in order."""
        from steepest.records import records_of

        file = Path(__file__).with_name(f"{function.__module__.rpartition('.')[2]}.py")
        task = f"{file}:{function.__name__}"
        jobs = [self._client.submit(task, arguments=arguments, **spec) for arguments, spec in cases]
        found = []
        for job in jobs:
            with contextlib.suppress(JobFailedError):
                job.wait()
            info = job.get()
            found.append((info, records_of(job.history(signals=True))))
            self.jobs, self.steps = self.jobs + 1, self.steps + info.step
        return found

    def records(
        self, function: Callable[..., Any], arguments: Sequence[Mapping[str, Any]], **spec: Any
    ) -> list[Records]:
        """The records of a task with each of these arguments. Raises RuntimeError for a job that failed."""
        found = self.all(function, [(each, spec) for each in arguments])
        for info, _ in found:
            if info.state != "SUCCEEDED":
                raise RuntimeError(f"{function.__name__}: {info.error or info.reason}")
        return [records for _, records in found]


def times(ratio: float) -> str:
    """A ratio in Markdown: 3.2, or 4.1·10⁻⁹."""
    if ratio == 0 or 0.01 <= abs(ratio) < 1000:
        return f"{ratio:.3g}"
    mantissa, power = f"{ratio:.1e}".split("e")
    return f"{mantissa}·10{str(int(power)).translate(_RAISED)}"


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
