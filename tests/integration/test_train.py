"""`steepest train` as a user types it, and jobs on a cluster of several raylets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from harness.local_job import hashes, job_config, run_here
from tests.support.service import COMMAND, EXAMPLES, TASKS, raylets, serving, until
from worker.task.load import load_task

pytestmark = pytest.mark.cluster

KEYS = """job state step samples loss metrics parameters_sha256 state_sha256 wall_seconds samples_per_second
workers servers error""".split()


def steepest(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=200, **options)


def test_train_leaves_what_the_contract_says(tmp_path: Path) -> None:
    output = tmp_path / "out"
    elsewhere = {"STEEPEST_SERVER": "nowhere:1", "STEEPEST_TOKEN": "secret", "STEEPEST_TLS_CA": "nowhere.pem"}
    run = steepest(
        "train", f"{EXAMPLES / 'digits.py'}:mlp", "--steps", "40", "--workers", "2", "--lr", "0.01",
        "--arg", "hidden=32", "--set", "optimizer.betas=[0.9,0.95]", "--output", str(output), "--json",
        env={**os.environ, **elsewhere},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert set(KEYS) <= set(result)
    assert (result["state"], result["step"], result["samples"]) == ("SUCCEEDED", 40, 22 * 64 + 29 + 17 * 64)
    assert result["error"] is None
    assert result["samples_per_second"] > 0
    assert {"id", "pid", "host", "state"} == set(result["workers"][0])
    assert len(result["workers"]) == 2
    assert "step 40/40" in run.stderr
    names = {"model.safetensors", "optimizer.safetensors", "manifest.json", "history.parquet", "signals.parquet"}
    assert {p.name for p in output.iterdir()} == names
    config = job_config(
        tmp_path / "here", "examples.digits:mlp", arguments={"hidden": 32}, steps=40,
        optimizer={"lr": 0.01, "betas": [0.9, 0.95]},
    )  # fmt: skip
    assert (result["parameters_sha256"], result["state_sha256"]) == hashes(run_here(config))
    task: Any = load_task(config.spec.task, None, 0)
    task.model.load_state_dict(load_file(output / "model.safetensors"), strict=True)
    history = pq.read_table(output / "history.parquet")
    assert history["step"].to_pylist() == list(range(40))
    assert history["loss"].to_pylist()[-1] == result["loss"]


@pytest.mark.full
def test_a_failed_job_exits_with_1_and_shows_the_users_traceback() -> None:
    run = steepest("train", f"{TASKS}:failing_dataset", "--steps", "50", "--json")
    assert run.returncode == 1
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["state"] == "FAILED"
    assert "is torn" in result["error"]
    assert "__getitem__" in result["error"]


@pytest.mark.full
def test_a_refused_task_exits_with_2() -> None:
    run = steepest("train", f"{TASKS}:without_parameters", "--epochs", "1")
    assert run.returncode == 2
    assert "task.model" in run.stderr
    assert "no trainable parameters" in run.stderr
    assert run.stdout == ""


@pytest.mark.full
def test_ctrl_c_cancels_cleanly_and_leaves_no_process(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = subprocess.Popen(
        [*COMMAND, "train", f"{TASKS}:slow", "--steps", "100000", "--output", str(output), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step "):
            break
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    result = json.loads(stdout.splitlines()[-1])
    assert result["state"] == "CANCELLED"
    assert result["parameters_sha256"]
    assert (output / "model.safetensors").exists()
    until(lambda: not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE])


@pytest.mark.full
def test_a_job_spreads_over_the_nodes_of_an_existing_cluster(tmp_path: Path) -> None:
    nodes = [{"num_cpus": 2}] * 3
    with raylets(nodes) as cluster_address, serving(tmp_path / "data", "--ray-address", cluster_address) as address:
        run = steepest(
            "submit", f"{TASKS}:large", "--steps", "6", "--workers", "5", "--servers", "3",
            "--set", "placement.transport=inline", "--server", address, "--watch", "--json",
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        result = json.loads(run.stdout.splitlines()[-1])
        expected = hashes(run_here(job_config(tmp_path / "here", "tests.support.tasks:large", steps=6)))
        assert (result["parameters_sha256"], result["state_sha256"]) == expected
        assert len(result["workers"]) == 5
