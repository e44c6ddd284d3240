"""Records as columns, and what is made of them: files, pictures, a report, other trackers' runs."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from steepest.charts import MOST_POINTS, as_svg, layers_figure, training_figure
from steepest.errors import SpecError, SteepestError
from steepest.export import mlflow as to_mlflow
from steepest.export import tensorboard, wandb
from steepest.jobs import Evaluation, Event, Finding, JobInfo, StepHistograms
from steepest.records import Records, read_directory, records_of, write_csv, write_parquet
from steepest.report import report_html
from steepest.spec import spec_from_dict


def row(step: int, **values: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "step": step, "time": 1e9 + step, "loss": 2.0 / (1 + step), "lr": 0.1, "weight": 4.0, "samples": 4,
        "gradient_norm": 2.0, "clipped_norm": 1.0, "clip_coefficient": 0.5, "clipped": step % 2 == 0, "skipped": False,
        "workers": 2, "step_seconds": 0.1, "compute_seconds": 0.07, "reduce_seconds": 0.02, "apply_seconds": 0.01,
        "data_seconds": 0.03, "slowest_worker": -1, "slowest_ratio": 1.0,
        "worker_seconds": 0.05, "mean_worker_seconds": 0.05,
        "sharpness": 5.0, "smallest_eigenvalue": -1.0,
        "parameter_norms": {"a.weight": 1.0 + step, "a.bias": 0.5}, "logged": {"kl": 0.1 * step},
        "signals": {"zeros": {"a.weight": 0.25, "a.bias": 0.0}} if step % 2 == 0 else {},
    }  # fmt: skip
    return {**usual, **values}


def made(steps: int = 6) -> Records:
    return records_of([row(step) for step in range(steps)])


def info(**values: Any) -> JobInfo:
    spec = spec_from_dict({"task": {"module": "m", "function": "f"}, "steps": 6})
    usual: dict[str, Any] = {
        "job": "trainingJobs/a-1", "state": "SUCCEEDED", "reason": "all 6 steps are done", "step": 6, "total_steps": 6,
        "samples": 24, "loss": 0.33, "metrics": {"accuracy": 0.9}, "parameters_sha256": "ab" * 32, "state_sha256": "",
        "wall_seconds": 3.0, "samples_per_second": 8.0, "workers": (), "servers": (), "error": None, "created": 1e9,
        "spec": spec,
    }  # fmt: skip
    return JobInfo(**{**usual, **values})


def test_columns_of_a_history() -> None:
    records = made()
    assert len(records) == 6
    assert records.column("loss").tolist() == [2.0 / (1 + step) for step in range(6)]
    assert records.column("logged.kl").tolist() == pytest.approx([0.1 * step for step in range(6)])
    assert records.norms["a.weight"].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert np.isnan(records.column("nothing")).all()
    assert [(s["step"], s["parameter"], s["zeros"]) for s in records.signals[:3]] == [
        (0, "a.weight", 0.25), (0, "a.bias", 0.0), (2, "a.weight", 0.25),
    ]  # fmt: skip
    assert len(records_of([])) == 0


def test_parquet_there_and_back(tmp_path: Path) -> None:
    records = made()
    write_parquet(records, tmp_path / "history.parquet")
    table = parquet.read_table(tmp_path / "history.parquet")
    assert str(table.schema.field("step").type) == "int64"
    assert str(table.schema.field("clipped").type) == "bool"
    again = read_directory(tmp_path)
    assert {name: values.tolist() for name, values in again.columns.items()} == {
        name: values.tolist() for name, values in records.columns.items()
    }
    assert again.norms["a.bias"].tolist() == [0.5] * 6
    assert again.signals == records.signals
    with pytest.raises(SpecError, match="cannot be read"):
        read_directory(tmp_path / "nowhere")


def test_csv(tmp_path: Path) -> None:
    write_csv(made(), tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [r["step"] for r in rows] == ["0", "1", "2", "3", "4", "5"]
    assert float(rows[2]["norm.a.weight"]) == 3.0
    assert float(rows[3]["logged.kl"]) == pytest.approx(0.3)


def test_a_picture_has_what_it_should(tmp_path: Path) -> None:
    finding = Finding("exploding", "critical", 3, "large")
    figure = training_figure(made(), "a job", [finding])
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == ["Loss", "Gradient norm", "Steps that were clipped, %", "Samples a second"]
    assert as_svg(figure) == as_svg(training_figure(made(), "a job", [finding]))
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SteepestError, match="nothing to draw"):
        training_figure(records_of([]), "empty")


def test_a_spike_survives_in_a_long_picture() -> None:
    columns = {name: np.array(values) for name, values in made(2).columns.items()}
    steps = 3 * MOST_POINTS
    long = {name: np.resize(values, steps).astype(float) for name, values in columns.items()}
    long["step"] = np.arange(steps, dtype=float)
    long["gradient_norm"] = np.ones(steps)
    long["gradient_norm"][7777] = 123.0
    [collection, *_] = training_figure(Records(long), "long").axes[1].collections
    assert max(path.vertices[:, 1].max() for path in collection.get_paths()) == 123.0


def test_layers_without_norms_or_with_zeros() -> None:
    assert layers_figure(Records(made().columns)) is None
    dead = Records(made().columns, {"a": np.zeros(6), "b": np.array([math.nan] * 6)})
    assert layers_figure(dead) is not None


def test_a_report_stands_alone_and_escapes_what_it_is_given() -> None:
    bad = "<script>alert(1)</script>"
    finding = Finding("nonfinite", "critical", 2, bad, "a.weight", "worker-0", 1, (3, 4))
    text = report_html(info(error=bad, findings=(finding,)), made(), [Event(1, 1e9, "QUEUED", bad)], "1.0")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 3
    for word in ("SUCCEEDED", "Evaluation: accuracy", "samples 3, 4", "a.weight", "worker-0", "micro-batch 1"):
        assert word in text
    assert text.count("<svg") == 3
    for outside in ('src="http', 'href="http', "@import", "url(http"):
        assert outside not in text
    assert "None." in report_html(info(), records_of([]), [], "1.0")


def test_event_files_of_tensorboard(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tensorboard(tmp_path, "a-1") as log:
        log(made(3))
        log(records_of([], [], [StepHistograms(0, (0.1, 1.0, 10.0), {"a.weight": (3, 1), "b": (0, 0)})]))
        log(records_of([row(step) for step in range(3, 6)], [Evaluation(4, {"loss": 0.5, "accuracy": math.nan})]))
    events = accumulators.EventAccumulator(str(tmp_path / "a-1"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [(e.step, e.wall_time) for e in losses] == [(step, 1e9 + step) for step in range(6)]
    assert [e.value for e in losses] == pytest.approx([2.0 / (1 + step) for step in range(6)])
    assert len(events.Scalars("norm/a.weight")) == 6
    assert [(e.step, e.wall_time, e.value) for e in events.Scalars("evaluation/loss")] == [(4, 1e9 + 4, 0.5)]
    assert "evaluation/accuracy" not in events.Tags()["scalars"]
    assert events.Tags()["histograms"] == ["log10 |g|/a.weight"]
    [histogram] = events.Histograms("log10 |g|/a.weight")
    assert (histogram.histogram_value.num, histogram.histogram_value.bucket[:2]) == (4, [3, 1])


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_run_of_mlflow(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    with to_mlflow(tmp_path, "a-1") as log:
        log(made())
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("steepest").experiment_id])
    assert run.info.run_name == "a-1"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [metric.step for metric in history] == list(range(6))


@pytest.mark.full
def test_an_offline_run_of_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    with wandb(tmp_path, "a-1") as log:
        log(made(3))
        log(records_of([row(3), row(4)], [Evaluation(1, {"loss": 0.5}), Evaluation(2, {"loss": 0.4})]))
        log(records_of([row(5)]))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_spec_is_in_the_report() -> None:
    text = report_html(info(), made(), [], "1.0")
    assert json.dumps("m").replace('"', "&#34;") in text
