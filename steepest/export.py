"""The records of a job for other trackers, each through its own library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from steepest.errors import SteepestError
from steepest.records import Records


def _scalars(records: Records) -> Iterator[tuple[int, float, dict[str, float]]]:
    """(step, time, numbers by name) of each step; those that are not finite are left out."""
    columns = {name: values for name, values in records.columns.items() if name not in ("step", "time")}
    columns |= {f"norm/{name}": values for name, values in records.norms.items()}
    steps, times = records.columns["step"], records.column("time")
    for row, step in enumerate(steps.tolist()):
        numbers = {name: float(values[row]) for name, values in columns.items() if np.isfinite(values[row])}
        yield int(step), float(times[row]), numbers


def to_tensorboard(records: Records, directory: Path) -> None:
    """Event files of TensorBoard. Raises SteepestError when it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _missing("TensorBoard", "tensorboard") from None
    with SummaryWriter(str(directory)) as writer:
        for step, time, numbers in _scalars(records):
            for name, value in numbers.items():
                writer.add_scalar(name, value, step, walltime=time)


def to_mlflow(records: Records, directory: Path, run: str) -> None:
    """A run in an MLflow store of files. Raises SteepestError when MLflow is not installed."""
    try:
        from mlflow import MlflowClient
        from mlflow.entities import Metric
    except ImportError:
        raise _missing("MLflow", "mlflow-skinny") from None
    client = MlflowClient(tracking_uri=f"sqlite:///{directory.resolve() / 'mlflow.db'}")
    directory.mkdir(parents=True, exist_ok=True)
    experiment = client.get_experiment_by_name("steepest")
    number = client.create_experiment("steepest") if experiment is None else experiment.experiment_id
    made = client.create_run(number, run_name=run)
    for step, time, numbers in _scalars(records):
        metrics = [Metric(_word(name), value, round(time * 1000), step) for name, value in numbers.items()]
        for start in range(0, len(metrics), 1000):
            client.log_batch(made.info.run_id, metrics=metrics[start : start + 1000])
    client.set_terminated(made.info.run_id)


def to_wandb(records: Records, directory: Path, run: str) -> None:
    """A run of Weights & Biases, written offline; `wandb sync` sends it. Raises SteepestError without wandb."""
    try:
        import wandb
    except ImportError:
        raise _missing("Weights & Biases", "wandb") from None
    directory.mkdir(parents=True, exist_ok=True)
    with wandb.init(project="steepest", name=run, dir=str(directory), mode="offline") as made:
        for step, _, numbers in _scalars(records):
            made.log(numbers, step=step)


def _word(name: str) -> str:
    """A name with what MLflow allows in one."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in name)


def _missing(library: str, package: str) -> SteepestError:
    return SteepestError(f"{library} is not installed: pip install {package}")
