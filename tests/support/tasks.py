"""Tasks that the tests train. They are imported by name in worker processes."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import steepest

NUM_INPUTS, NUM_OUTPUTS = 7, 3


def arrays(rows: int = 101, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets; 101 rows divide neither a global nor a micro-batch."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, NUM_INPUTS, generator=generator, dtype=torch.float64)
    weights = torch.randn(NUM_INPUTS, NUM_OUTPUTS, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), torch.tanh(inputs @ weights).to(dtype)


def perceptron(hidden: int = 50) -> nn.Module:
    return nn.Sequential(nn.Linear(NUM_INPUTS, hidden), nn.Tanh(), nn.Linear(hidden, NUM_OUTPUTS))


def regression(rows: int = 101, hidden: int = 50, dtype: str = "float32") -> steepest.Task:
    real = getattr(torch, dtype)
    inputs, targets = arrays(rows, real)
    return steepest.Task(
        model=perceptron(hidden).to(real),
        loss=nn.MSELoss(),
        train_data=steepest.ArrayData(inputs, targets),
        eval_data=steepest.ArrayData(inputs[:50], targets[:50]),
    )


class Rows(torch.utils.data.Dataset[Any]):
    """A map-style dataset with noise, so that its order and seeds show in the bits.

    delay: seconds for a batch. fail_at: it fails after so many samples.
    """

    def __init__(self, delay: float = 0.0, fail_at: int = -1) -> None:
        self.inputs, self.targets = arrays()
        self.delay = delay
        self.fail_at = fail_at
        self.fetched = 0

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.fetched += 1
        if 0 <= self.fail_at < self.fetched:
            raise OSError(f"sample {index} is torn")
        noise = torch.randn(NUM_INPUTS) * 0.01 + float(np.random.normal()) * 0.01
        return self.inputs[index] + noise, self.targets[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        time.sleep(self.delay)
        return [self[i] for i in indices]


def slow(delay: float = 0.01) -> steepest.Task:
    """Each micro-batch takes a while, so that a test can do something in mid-step."""
    model = nn.Sequential(nn.Linear(NUM_INPUTS, 64), nn.BatchNorm1d(64), nn.Dropout(0.1), nn.Linear(64, NUM_OUTPUTS))
    return steepest.Task(model=model, loss=nn.MSELoss(), train_data=Rows(delay))


def evaluated(delay: float = 0.0) -> steepest.Task:
    """As `slow`, with data to evaluate on."""
    return dataclasses.replace(slow(delay), eval_data=steepest.ArrayData(*arrays()))


def deep(delay: float = 0.0, width: int = 600) -> steepest.Task:
    """As `slow`, with a gradient that leaves in several buckets."""
    model = nn.Sequential(
        nn.Linear(NUM_INPUTS, width),
        nn.BatchNorm1d(width),
        nn.Linear(width, width),
        nn.Dropout(0.1),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.Linear(width, NUM_OUTPUTS),
    )
    return steepest.Task(model=model, loss=nn.MSELoss(), train_data=Rows(delay))


class CheckpointedTwice(nn.Module):
    """Uses a layer under two reentrant checkpoints: autograd hands over its gradient in two parts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(NUM_INPUTS, width)
        self.shared = nn.Linear(width, width)
        self.last = nn.Linear(width, NUM_OUTPUTS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(inputs))
        for _ in range(2):
            hidden = torch.tanh(checkpoint(self.shared, hidden, use_reentrant=True))
        return self.last(hidden)


def checkpointed_twice(width: int = 50) -> steepest.Task:
    return steepest.Task(model=CheckpointedTwice(width), loss=nn.MSELoss(), train_data=steepest.ArrayData(*arrays()))


def large(rows: int = 60, width: int = 400) -> steepest.Task:
    """Enough blocks for several shards."""
    inputs, targets = arrays(rows)
    model = nn.Sequential(
        nn.Linear(NUM_INPUTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, NUM_OUTPUTS)
    )
    return steepest.Task(model=model, loss=nn.MSELoss(), train_data=steepest.ArrayData(inputs, targets))


# -- tasks that fail ------------------------------------------------------------------------------------------------


def raises() -> steepest.Task:
    raise KeyError("no such column")


def returns_nothing() -> None:
    return None


def sleeps() -> steepest.Task:
    time.sleep(3600)
    raise AssertionError


def exits() -> steepest.Task:
    sys.exit(7)


def without_parameters() -> steepest.Task:
    return steepest.Task(model=nn.ReLU(), loss=nn.MSELoss(), train_data=steepest.ArrayData(*arrays()))


def without_data() -> steepest.Task:
    empty = torch.zeros(0, NUM_INPUTS), torch.zeros(0, NUM_OUTPUTS)
    return steepest.Task(model=perceptron(), loss=nn.MSELoss(), train_data=steepest.ArrayData(*empty))


def vector_loss() -> steepest.Task:
    return steepest.Task(
        model=perceptron(), loss=lambda outputs, targets: outputs - targets, train_data=steepest.ArrayData(*arrays())
    )


def nonfinite_loss(row: int = 40) -> steepest.Task:
    inputs, targets = arrays()
    targets[row] = torch.nan
    return steepest.Task(model=perceptron(), loss=nn.MSELoss(), train_data=steepest.ArrayData(inputs, targets))


def nonfinite_gradient() -> steepest.Task:
    """The loss is finite, the gradient of its square root at zero is not."""

    def batch_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.sqrt((model(batch[0]) * 0.0).sum())

    return steepest.Task(model=perceptron(), batch_loss=batch_loss, train_data=steepest.ArrayData(*arrays()))


def failing_dataset(after: int = 1000) -> steepest.Task:
    return steepest.Task(model=perceptron(), loss=nn.MSELoss(), train_data=Rows(fail_at=after))


class _Misbehaving(nn.Module):
    def __init__(self, how: str, marker: str) -> None:
        super().__init__()
        self.inner = perceptron()
        self.how = how
        self.marker = Path(marker) if marker else None
        self.register_buffer("calls", torch.zeros(()))  # of the first micro-batch: steps

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        match self.how:
            case "exit" if self.calls > 4:
                sys.exit(3)
            case "print":
                sys.stdout.write("x" * 1_000_000 + "\n")
            case "threads":
                threading.Thread(target=time.sleep, args=(3600,), daemon=False).start()
            case "hang" if self.calls > 4 and self.marker is not None and not self.marker.exists():
                self.marker.touch()
                time.sleep(3600)
            case "die" if self.calls > 4:
                os.kill(os.getpid(), 9)
        outputs: torch.Tensor = self.inner(inputs)
        return outputs


def misbehaving(how: str, marker: str = "") -> steepest.Task:
    return steepest.Task(model=_Misbehaving(how, marker), loss=nn.MSELoss(), train_data=steepest.ArrayData(*arrays()))


def least_squares() -> steepest.AnalyticTask:
    """Without torch: L = |X w - y|^2 / 2 summed, dL/dw = X^T (X w - y)."""
    inputs, targets = (a.numpy() for a in arrays(dtype=torch.float64))

    def gradient(parameters: Any, batch: Any) -> tuple[float, float, dict[str, Any]]:
        residual = batch[0] @ parameters["weight"] - batch[1]
        return float(0.5 * np.sum(residual**2)), float(len(residual)), {"weight": batch[0].T @ residual}

    return steepest.AnalyticTask(
        parameters={"weight": np.zeros((NUM_INPUTS, NUM_OUTPUTS))},
        gradient=gradient,
        train_data=steepest.ArrayData(inputs, targets),
    )


def talkative() -> steepest.Task:
    """Prints when it is set up and in every pass, and returns numbers beside its loss."""
    print("set up")
    inputs, targets = arrays()

    def loss(model: nn.Module, batch: Any) -> Any:
        print(f"a pass over {len(batch[0])}")
        rows, wanted = batch
        outputs = model(rows)
        squares = (outputs - wanted).square()
        return squares.mean(), {"largest": squares.max(), "rows": len(rows)}

    return steepest.Task(model=perceptron(), batch_loss=loss, train_data=steepest.ArrayData(inputs, targets))


class _Secretive(nn.Module):
    """Prints a secret, at once and in two halves. fails: or raises it, after some steps."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.inner = perceptron()
        self.fails = fails
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        key = os.environ["API_KEY"]
        print(f"with {key}", file=sys.stderr)
        sys.stdout.write(key[:5])
        sys.stdout.write(f"{key[5:]} in halves\n")
        self.calls += 1
        if self.fails and self.calls > 4:
            raise ValueError(f"{key} is wrong")
        outputs: torch.Tensor = self.inner(inputs)
        return outputs


def secretive(how: str = "print") -> steepest.Task:
    """Prints variables of its environment, one of them secret. how: or raises it, here or in a pass, or exits."""
    print(f"{os.environ['REGION']}: {os.environ['API_KEY']}", flush=True)
    if how == "raise":
        raise ValueError(f"{os.environ['API_KEY']} is wrong")
    if how == "exit":
        os._exit(3)
    model = _Secretive(fails=how == "fail")
    return steepest.Task(model=model, loss=nn.MSELoss(), train_data=steepest.ArrayData(*arrays()))


def prints_markup() -> steepest.Task:
    """Prints what a page must not take for its own."""
    print("<img src=x onerror=alert(1)>")
    return regression()


def requiring() -> steepest.Task:
    """It needs a package that is not installed."""
    import steepest_extra

    print(f"steepest_extra has {steepest_extra.SCALE}", flush=True)
    return regression()


class _InFloat64(nn.Module):
    """Trains well; what it does in float64 is up to it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner = perceptron()
        self._how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64:
            if self._how == "fail":
                raise ValueError("too deep")
            if self._how == "die":
                print("leaving", flush=True)
                time.sleep(0.5)
                os._exit(3)
            print(f"in {os.getpid()}", flush=True)
            time.sleep(60.0)
        return self.inner(x)


def _in_float64(how: str) -> steepest.Task:
    return steepest.Task(model=_InFloat64(how), loss=nn.MSELoss(), train_data=steepest.ArrayData(*arrays()))


def fails_in_float64() -> steepest.Task:
    """An analysis of it raises."""
    return _in_float64("fail")


def dies_in_float64() -> steepest.Task:
    """An analysis of it ends its process, some time after it said so."""
    return _in_float64("die")


def stays_in_float64() -> steepest.Task:
    """An analysis of it takes a minute for each pass."""
    return _in_float64("stay")
