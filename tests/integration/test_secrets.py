"""Environment variables and secrets reach a task's code, and no secret is in anything that is kept or told."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from services.service import Service
from steepest.client import Client, Job
from steepest.errors import SpecError
from tests.integration.conftest import SECRET
from tests.support.command import run
from tests.support.documented import is_documented
from tests.support.service import COMMAND, TASKS, until

pytestmark = pytest.mark.cluster

VARIABLES = {"environment": {"REGION": "north"}, "secrets": {"API_KEY": "hub"}}
SHORT = {"steps": 3, "data": {"global_batch": 20, "micro_batch": 10}, "placement": {"workers": 2, "servers": 2}}


def found_in(directory: Path) -> list[Path]:
    """Files that have the secret in them."""
    files = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files
    return [path for path in files if SECRET.encode() in path.read_bytes()]


def test_code_has_its_variables_and_no_file_has_the_secret(service: Service, submit: Callable[..., Job]) -> None:
    job = submit("secretive", **VARIABLES, **SHORT)
    assert job.wait().state == "SUCCEEDED"
    lines = list(job.logs())
    rehearsed = [line.text for line in lines if line.process == "submission"]
    assert rehearsed[0] == "north: ***"
    assert {"with ***", "*** in halves"} < set(rehearsed)
    trained = {(line.stream, line.text) for line in lines if line.process.startswith("worker-")}
    assert {("stdout", "*** in halves"), ("stderr", "with ***"), ("stdout", "north: ***")} <= trained
    assert job.curvature(samples=10, top=1).eigenvalues
    assert not found_in(service.settings.data_directory)
    info = job.get()
    assert info.spec.secrets == {"API_KEY": "hub"}
    assert SECRET not in repr(info)


def test_no_log_of_rays_has_the_secret(client: Client, submit: Callable[..., Job]) -> None:
    submit("secretive", **VARIABLES, **SHORT).wait()
    assert not found_in(Path(ray._private.worker._global_node.get_logs_dir_path()))


def test_errors_do_not_have_it(submit: Callable[..., Job]) -> None:
    with pytest.raises(SpecError) as refused:
        submit("secretive", arguments={"how": "raise"}, **VARIABLES, **SHORT)
    assert "ValueError: *** is wrong" in str(refused.value)
    assert "secretive" in str(refused.value)
    with pytest.raises(SpecError, match=r"exit status 3\)\nnorth: \*\*\*"):
        submit("secretive", arguments={"how": "exit"}, **VARIABLES, **SHORT)
    job = submit("secretive", arguments={"how": "fail"}, **VARIABLES, **{**SHORT, "steps": 30})
    info = until(lambda: job.get() if job.get().has_ended else None)
    assert info.state == "FAILED"
    assert "ValueError: *** is wrong" in (info.error or "")
    assert SECRET not in repr(info)


def test_what_is_not_there_is_said_before_anything_runs(submit: Callable[..., Job]) -> None:
    with pytest.raises(SpecError) as refused:
        submit("secretive", secrets={"API_KEY": "club"}, steps=1)
    assert is_documented("a job names a secret that is not there", str(refused.value))


def test_the_command_takes_them(client: Client) -> None:
    options = ("--env", "REGION=a=b", "--secret", "API_KEY=hub", "--steps", "2", "--server", client.address)
    done = run("submit", f"{TASKS}:secretive", "--watch", *options)
    assert done.returncode == 0, done.stderr
    assert "a=b: ***" in done.stdout + done.stderr
    refused = run("submit", f"{TASKS}:secretive", "--secret", "API_KEY", "--steps", "2", "--server", client.address)
    assert refused.returncode == 2
    assert "--secret" in refused.stderr


@pytest.mark.full
def test_train_takes_them_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "hub").write_text(SECRET)
    options = ("--env", "REGION=south", "--secret", "API_KEY=hub", "--steps", "2")
    command = [*COMMAND, "train", f"{TASKS}:secretive", *options]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "STEEPEST_SECRETS_DIR" in refused.stderr
    environment = {**os.environ, "STEEPEST_SECRETS_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "south: ***" in done.stdout + done.stderr
    assert SECRET not in done.stdout + done.stderr
