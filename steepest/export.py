"""The records of a job for other trackers, each through its own library: at once, or while the job runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from steepest.errors import SteepestError
from steepest.follow import news_of
from steepest.records import Records, records_of

if TYPE_CHECKING:
    from steepest.client import Job

Log = Callable[[Records], None]  # takes the records of some more steps


def _scalars(records: Records) -> Iterator[tuple[int, float, dict[str, float]]]:
    """(step, time, numbers by name) of each step, then of each evaluation; those not finite are left out."""
    columns = {name: values for name, values in records.columns.items() if name not in ("step", "time")}
    columns |= {f"norm/{name}": values for name, values in records.norms.items()}
    steps, times = records.columns["step"], records.column("time")
    for row, step in enumerate(steps.tolist()):
        numbers = {name: float(values[row]) for name, values in columns.items() if np.isfinite(values[row])}
        yield int(step), float(times[row]), numbers
    for evaluation in records.evaluations:
        row = int(np.searchsorted(steps, evaluation.step))
        moment = float(times[min(row, len(times) - 1)]) if len(times) else time.time()
        numbers = {f"evaluation/{name}": value for name, value in evaluation.metrics.items() if np.isfinite(value)}
        yield evaluation.step, moment, numbers


@contextmanager
def tensorboard(directory: Path, run: str) -> Iterator[Log]:
    """Event files of TensorBoard, in a directory for the run. Raises SteepestError when it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _missing("TensorBoard", "tensorboard") from None
    with SummaryWriter(str(directory / run)) as writer:

        def log(records: Records) -> None:
            for step, moment, numbers in _scalars(records):
                for name, value in numbers.items():
                    writer.add_scalar(name, value, step, walltime=moment)
            for histogram in records.histograms:
                limits = np.log10(histogram.edges)
                for name, counts in histogram.counts.items():
                    _add_histogram(writer, f"log10 |g|/{name}", np.array(counts), limits, histogram.step)
            writer.flush()

        yield log


def _add_histogram(writer: Any, tag: str, counts: NDArray[np.int64], limits: NDArray[np.float64], step: int) -> None:
    """limits: edges of the bins, one more than there are."""
    used = np.flatnonzero(counts)
    if not len(used):
        return
    middles = (limits[1:] + limits[:-1]) / 2
    writer.add_histogram_raw(
        tag,
        min=limits[used[0]],
        max=limits[used[-1] + 1],
        num=int(counts.sum()),
        sum=float(counts @ middles),
        sum_squares=float(counts @ middles**2),
        bucket_limits=limits[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


@contextmanager
def mlflow(directory: Path, run: str) -> Iterator[Log]:
    """A run in an MLflow store of files. Raises SteepestError when MLflow is not installed."""
    try:
        from mlflow import MlflowClient
        from mlflow.entities import Metric
    except ImportError:
        raise _missing("MLflow", "mlflow-skinny") from None
    directory.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=f"sqlite:///{directory.resolve() / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("steepest")
    number = client.create_experiment("steepest") if experiment is None else experiment.experiment_id
    made = client.create_run(number, run_name=run)

    def log(records: Records) -> None:
        for step, moment, numbers in _scalars(records):
            metrics = [Metric(_word(name), value, round(moment * 1000), step) for name, value in numbers.items()]
            for start in range(0, len(metrics), 1000):
                client.log_batch(made.info.run_id, metrics=metrics[start : start + 1000])

    status = "KILLED"
    try:
        yield log
        status = "FINISHED"
    finally:
        client.set_terminated(made.info.run_id, status)


@contextmanager
def wandb(directory: Path, run: str) -> Iterator[Log]:
    """A run of Weights & Biases, written offline; `wandb sync` sends it. Raises SteepestError without wandb."""
    try:
        import wandb as library
    except ImportError:
        raise _missing("Weights & Biases", "wandb") from None
    directory.mkdir(parents=True, exist_ok=True)
    with library.init(project="steepest", name=run, dir=str(directory), mode="offline") as made:
        made.define_metric("*", step_metric="step")  # W&B's own steps only grow, and evaluations come late

        def log(records: Records) -> None:
            for step, _, numbers in _scalars(records):
                made.log({**numbers, "step": step})

        yield log


def follow(job: Job, log: Log) -> str:
    """Log what there is of a job as it comes until it has ended; returns its state.

    Steps that are made again, after a rollback say, are logged again. Raises ServiceUnavailableError when the service
    is away for a minute.
    """
    for news in news_of(job, records=True, evaluations=True):
        if news.records or news.evaluations:
            log(records_of(news.records, news.evaluations))
    log(records_of((), (), job.histograms()))
    return news.info.state


def _word(name: str) -> str:
    """A name with what MLflow allows in one."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in name)


def _missing(library: str, package: str) -> SteepestError:
    return SteepestError(f"{library} is not installed: pip install {package}")
