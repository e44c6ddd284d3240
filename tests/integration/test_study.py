"""Gradient checks and curvature, from the command."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from services.service import Service
from steepest.client import Client, Job
from steepest.errors import ConflictError, SpecError
from tests.support.command import Ran, run
from tests.support.documented import is_documented
from tests.support.service import COMMAND, TASKS, raylets, serving, until

pytestmark = pytest.mark.cluster

WRONG = """
import numpy as np
import steepest

def task(error: float = 0.0):
    x = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    y = x @ np.array([1.0, -2.0, 0.5], np.float32)

    def gradient(parameters, batch):
        inputs, targets = batch
        rest = inputs @ parameters["w"] - targets
        slope = inputs.T @ rest
        slope[1] *= 1 + error
        return 0.5 * (rest**2).sum(), len(targets), {"w": slope}

    return steepest.AnalyticTask(
        parameters={"w": np.zeros(3, np.float32)}, gradient=gradient, train_data=steepest.ArrayData(x, y)
    )
"""


@pytest.fixture
def steepest(client: Client) -> Callable[..., Ran]:
    return lambda *arguments: run(*arguments, "--server", client.address)


def test_a_gradient_check_says_which_entry_is_wrong(tmp_path: Path, steepest: Callable[..., Ran]) -> None:
    (tmp_path / "by_hand.py").write_text(WRONG)
    task = f"{tmp_path / 'by_hand.py'}:task"
    right = steepest("check-gradients", task, "--json")
    assert right.returncode == 0, right.stderr
    found = json.loads(right.stdout.splitlines()[-1])
    assert found["passed"]
    assert found["max_relative_error"] < 1e-9
    assert set(found["parameters"]) == {"w"}
    wrong = steepest("check-gradients", task, "--arg", "error=1e-4", "--processes", "2", "--json")
    assert wrong.returncode == 1
    found = json.loads(wrong.stdout.splitlines()[-1])
    assert (found["passed"], found["worst"]["parameter"], found["worst"]["index"]) == (False, "w", [1])
    assert found["max_relative_error"] == pytest.approx(1e-4, rel=1e-3)
    assert run("check-gradients", task, "--got", "guessing").returncode == 2


@pytest.mark.full
def test_a_gradient_check_here_for_people_and_one_that_is_refused(tmp_path: Path) -> None:
    (tmp_path / "by_hand.py").write_text(WRONG)
    task = f"{tmp_path / 'by_hand.py'}:task"

    def here(*options: str) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, "check-gradients", task, *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for_people = here("--arg", "error=1e-4")
    assert for_people.returncode == 1, for_people.stderr
    assert "worst: w[1]" in for_people.stdout
    assert "do NOT agree" in for_people.stdout
    refused = here("--expected", "forward", "--json")
    assert refused.returncode == 2
    assert "needs a task of torch" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_what_a_check_cannot_have_is_refused(client: Client) -> None:
    for asked, field in (
        ({"got": "guessing"}, "got: 'guessing'"),
        ({"tolerance": 2.0}, "tolerance: 2; allowed"),
        ({"processes": 65}, "processes: 65; allowed: 1 to 64"),
        ({"optimizer": {"name": "sgdd"}}, "optimizer.name"),
    ):
        with pytest.raises(SpecError, match=field):
            client.check_gradients(f"{TASKS}:regression", **asked)
    with pytest.raises(SpecError, match=r"ValueError: too deep(.|\n)*in forward"):
        client.check_gradients(f"{TASKS}:fails_in_float64", processes=2)


@pytest.mark.full
def test_curvature_of_a_job(steepest: Callable[..., Ran], client: Client) -> None:
    job = client.submit(f"{TASKS}:regression", steps=20)
    job.wait()
    ran = steepest("curvature", job.name, "--samples", "100", "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert (found["job"], found["step"], found["samples"]) == (job.name, 20, 100)
    assert found["eigenvalues"] == sorted(found["eigenvalues"], reverse=True)
    assert found["point"] in ("minimum", "saddle")
    assert found["smallest_eigenvalue"] <= found["eigenvalues"][-1] <= found["sharpness"]
    assert len(found["density"]["grid"]) == len(found["density"]["values"])
    for refused, word in (
        (["--step", "7"], "no checkpoint of step 7"),
        (["--samples", "100000"], "allowed: 1 to"),
        (["--matrix", "fisher"], "allowed: hessian, gauss_newton"),
        (["--jacobian", "100000"], "jacobian: 100000; allowed: 1 to"),
    ):
        answer = steepest("curvature", job.name, *refused)
        assert answer.returncode == 2
        assert word in answer.stderr


@pytest.mark.full
def test_curvature_is_the_same_with_more_processes(steepest: Callable[..., Ran], submit: Callable[..., Job]) -> None:
    job = submit("regression", steps=5)
    job.wait()
    one = steepest("curvature", job.name, "--samples", "100", "--json")
    found = json.loads(one.stdout.splitlines()[-1])
    for processes in ("2", "3"):
        again = steepest("curvature", job.name, "--samples", "100", "--processes", processes, "--json")
        assert json.loads(again.stdout.splitlines()[-1]) == found
    for_people = steepest("curvature", job.name, "--samples", "64", "--top", "2", "--jacobian", "3")
    assert f"kind of point         {found['point']}" in for_people.stdout
    assert "Jacobian of outputs   9 singular values" in for_people.stdout  # three outputs a sample
    options = ("--samples", "100", "--matrix", "gauss_newton", "--jacobian", "3", "--json")
    newton = steepest("curvature", job.name, *options)
    about = json.loads(newton.stdout.splitlines()[-1])
    assert (about["matrix"], found["matrix"], about["point"]) == ("gauss_newton", "hessian", "minimum")
    assert about["jacobian_singular_values"] == sorted(about["jacobian_singular_values"], reverse=True)
    assert len(about["jacobian_singular_values"]) == 9


@pytest.mark.full
def test_a_job_without_torch_has_no_curvature(steepest: Callable[..., Ran], submit: Callable[..., Job]) -> None:
    job = submit("least_squares", steps=3)
    job.wait()
    answer = steepest("curvature", job.name)
    assert answer.returncode == 2
    assert "needs a task of torch" in answer.stderr


@pytest.mark.full
def test_an_analysis_uses_hosts_of_the_cluster(tmp_path: Path) -> None:
    """Two raylets of one CPU each: neither has room for two processes."""
    with (
        raylets([{"num_cpus": 1}] * 2) as cluster,
        serving(tmp_path / "data", "--ray-address", cluster) as address,
        Client(address) as client,
    ):
        job = client.submit(f"{TASKS}:regression", steps=5)
        job.wait()
        one = job.curvature(samples=100)
        assert job.curvature(samples=100, processes=2) == one
        check = client.check_gradients(f"{TASKS}:regression")
        assert check.passed
        assert client.check_gradients(f"{TASKS}:regression", processes=2) == check
        _waits_for_an_analysis(client)


def _waits_for_an_analysis(client: Client) -> None:
    """A job without room, for an analysis that holds all of it, says so, and has it when that ends."""
    stays = client.submit(f"{TASKS}:stays_in_float64", steps=2)
    stays.wait()
    begun = threading.Event()
    with Client(client.address) as other:
        waiting = threading.Thread(
            target=_ask,
            args=(other.job(stays.name), lambda text: begun.set() if text.startswith("in ") else None),
            kwargs={"processes": 2},
        )
        waiting.start()
        assert begun.wait(60)
        job = client.submit(f"{TASKS}:regression", steps=2)
        until(lambda: "2 are in use by an analysis" in job.get().reason)
    waiting.join()
    assert job.wait().step == 2


def test_what_it_prints_is_shown_and_a_death_is_explained(submit: Callable[..., Job]) -> None:
    job = submit("dies_in_float64", steps=2)
    job.wait()
    lines: list[str] = []
    with pytest.raises(SpecError) as died:
        job.curvature(samples=10, say=lines.append)
    assert "leaving" in lines
    assert "exited with status 3" in str(died.value)
    assert is_documented("a process of an analysis dies", str(died.value))
    with pytest.raises(SpecError, match="exited with status 3"):
        job.curvature(samples=100, processes=2)


def test_an_analysis_that_nobody_waits_for_ends(submit: Callable[..., Job], client: Client) -> None:
    job = submit("stays_in_float64", steps=2)
    job.wait()
    pids: list[int] = []

    def say(text: str) -> None:
        pids.extend(int(text.removeprefix("in ")) for _ in range(text.startswith("in ")))

    with Client(client.address) as other:
        waiting = threading.Thread(target=_ask, args=(other.job(job.name), say))
        waiting.start()
        until(lambda: pids)
        with pytest.raises(ConflictError, match="another analysis is running"):
            job.curvature()
    waiting.join()
    until(lambda: not psutil.pid_exists(pids[0]))
    until(lambda: _answers(client))


def _ask(job: Job, say: Callable[[str], None], processes: int = 1) -> None:
    with contextlib.suppress(Exception):  # its client is closed meanwhile
        job.curvature(samples=10 if processes == 1 else 100, processes=processes, say=say)


def _answers(client: Client) -> bool:
    with contextlib.suppress(ConflictError):  # the one before is still ending
        return client.check_gradients(f"{TASKS}:regression").passed
    return False


def test_an_analysis_without_room_says_what_is_missing(
    client: Client, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.jobs.analysis.ROOM_SECONDS", 0.5)
    lines: list[str] = []
    with pytest.raises(ConflictError) as refused:
        client.check_gradients(f"{TASKS}:regression", processes=64, say=lines.append)
    assert is_documented("an analysis finds no room on the cluster", str(refused.value))
    assert lines
    assert lines[0].startswith("waiting for 64 CPUs: the cluster has")
