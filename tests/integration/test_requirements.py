"""Packages that a job requires reach its code in every process, and nobody else's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from steepest.client import Client, Job
from steepest.errors import SpecError
from tests.support.command import run
from tests.support.documented import is_documented
from tests.support.service import TASKS, serving
from tests.support.wheels import make_wheel, use_only

pytestmark = pytest.mark.cluster

SHORT = {"steps": 3, "data": {"global_batch": 20, "micro_batch": 10}, "placement": {"workers": 2, "servers": 2}}


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_only(tmp_path, monkeypatch)
    make_wheel(tmp_path, "steepest_extra", "1.2", "SCALE = 0.5\n")
    return tmp_path


def test_code_finds_its_packages(client: Client, submit: Callable[..., Job], index: Path) -> None:
    with pytest.raises(SpecError, match="No module named 'steepest_extra'"):
        submit("requiring", **SHORT)
    job = submit("requiring", requirements=["steepest_extra>=1"], **SHORT)
    assert job.wait().state == "SUCCEEDED"
    assert "packages that go along with the code: steepest_extra==1.2" in [event.reason for event in job.events()]
    lines = [line.text for line in job.logs() if line.process.startswith("worker-")]
    assert set(lines) == {"steepest_extra has 0.5"}
    assert job.curvature(samples=10, top=1).eigenvalues
    assert job.get().spec.requirements == ("steepest_extra>=1",)
    assert importlib.util.find_spec("steepest_extra") is None
    # A newer version does not change a job that is submitted again as it was.
    make_wheel(index, "steepest_extra", "1.3", "SCALE = 0.25\n")
    again = client.replay(job.name)
    assert again.wait().parameters_sha256 == job.get().parameters_sha256
    assert "packages that go along with the code: steepest_extra==1.2" in [event.reason for event in again.events()]


def test_commands_take_them(client: Client, tmp_path: Path) -> None:
    options = ("--requirement", "steepest_extra<2", "--steps", "2", "--server", client.address)
    done = run("submit", f"{TASKS}:requiring", "--watch", *options)
    assert done.returncode == 0, done.stderr
    checked = run("check", f"{TASKS}:requiring", "--requirement", "steepest_extra")
    assert checked.returncode == 0, checked.stderr
    job = tmp_path / "job.toml"
    job.write_text(f'task = "{TASKS}:requiring"\nsteps = 2\nrequirements = ["steepest_extra"]\n')
    done = run("submit", str(job), "--watch", "--server", client.address)
    assert done.returncode == 0, done.stderr
    for wrong in ("-r file", "steepest_extra @ file:///x.whl", "./folder"):
        refused = run(
            "submit", f"{TASKS}:requiring", "--requirement", wrong, "--steps", "2", "--server", client.address
        )
        assert refused.returncode == 2
        assert "allowed: a package of an index, as einops" in refused.stderr


def test_a_service_may_take_none(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "--cpus", "2", "--no-requirements") as address, Client(address) as client:
        with pytest.raises(SpecError) as refused:
            client.submit(f"{TASKS}:requiring", requirements=["steepest_extra"], **SHORT)
        assert is_documented("a job requires packages of a service that takes none", str(refused.value))
