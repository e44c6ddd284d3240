"""The command without a service: imports, help, refusals."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import run

pytestmark = pytest.mark.cluster

COMMANDS = [
    "train",
    "serve",
    "submit",
    "list",
    "get",
    "watch",
    "wait",
    "cancel",
    "pause",
    "resume",
    "scale",
    "download",
]


def _imported(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in out.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize(
    "statement",
    [
        "import steepest",
        "import steepest; steepest.Client, steepest.Task, steepest.ArrayData",
        "import steepest.cli; from typer.testing import CliRunner; CliRunner().invoke(steepest.cli.app, ['--help'])",
    ],
)
def test_the_client_and_help_import_neither_ray_nor_torch(statement: str) -> None:
    loaded = _imported(statement)
    assert "steepest" in loaded
    assert not {"ray", "torch", "sqlalchemy", "services", "worker", "ps"} & loaded


def test_help_lists_every_command() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    assert all(command in shown.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    shown = run(command, "--help")
    assert shown.returncode == 0
    assert "Usage" in shown.stdout


def test_help_wraps_to_the_terminal_and_not_as_the_source_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    lines = [line.strip() for line in run("check-gradients", "--help").stdout.splitlines()]
    [paragraph] = [line for line in lines if line.startswith("own is what training uses")]
    assert "forward is forward-mode differentiation" in paragraph


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text("def f(hidden=3): ...\n")
    (tmp_path / "worker.py").write_text("def f(): ...\n")
    return tmp_path


@pytest.mark.parametrize("command", ["train", "submit"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.py:f", "--steps", "1"], ["there is no file nowhere.py"]),
        (["train.py:g", "--steps", "1"], ["no function 'g'", "it has: f"]),
        (["worker.py:f", "--steps", "1"], ["worker.py", "reserved", "rename"]),
        (["train.py:f"], ["steps, epochs", "exactly one"]),
        (["train.py:f", "--steps", "1", "--epochs", "1"], ["steps = 1", "epochs = 1", "exactly one"]),
        (["train.py:f", "--steps", "1", "--optimizer", "adamx"], ["--optimizer", "'adamx'", "adamw"]),
        (["train.py:f", "--steps", "1", "--schedule", "cos"], ["--schedule", "'cos'", "cosine"]),
        (["train.py:f", "--steps", "1", "--lr", "0"], ["--lr", "'0'", "greater than 0"]),
        (["train.py:f", "--steps", "1", "--lr", "nan"], ["--lr", "nan", "finite"]),
        (["train.py:f", "--steps", "1", "--clip-norm", "-1"], ["--clip-norm", "'-1'", "greater than 0"]),
        (["train.py:f", "--steps", "1", "--clip-value", "0"], ["--clip-value", "'0'", "greater than 0"]),
        (["train.py:f", "--steps", "1", "--workers", "0"], ["--workers", "0", "greater than or equal to 1"]),
        (["train.py:f", "--steps", "1", "--workers", "many"], ["--workers", "many"]),
        (
            ["train.py:f", "--steps", "1", "--global-batch", "4", "--micro-batch", "5"],
            ["micro_batch = 5", "global_batch = 4", "1 to 4"],
        ),
        (["train.py:f", "--steps", "1", "--colour", "red"], ["--colour"]),
        (["train.py:f", "--steps", "1", "--set", "optimizer.beta=1"], ["optimizer.beta", "betas"]),
        (["train.py:f", "--steps", "1", "--device", "tpu"], ["--device", "'tpu'", "cpu"]),
    ],
)
def test_a_refused_job_has_one_clear_message_and_exit_code_2(
    project: Path, command: str, arguments: list[str], words: list[str]
) -> None:
    refused = run(command, *arguments, directory=project)
    assert refused.returncode == 2
    assert refused.stdout == ""
    said = " ".join(refused.stderr.replace("│", " ").split())
    assert all(word in said for word in words), refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_service_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steepest.client.CONNECT_SECONDS", 0.5)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        refused = run("list", "--server", address)
    assert refused.returncode == 2
    assert address in refused.stderr
    assert "steepest serve" in refused.stderr


@pytest.mark.parametrize("flag", ["--port", "--http-port"])
def test_a_port_in_use(flag: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        others = [other for other in ("--port", "--http-port") if other != flag]
        refused = run("serve", flag, str(port), others[0], "0", "--data-dir", str(tmp_path / "data"))
    assert refused.returncode == 2
    assert str(port) in refused.stderr
    assert "in use" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_an_address_without_protection_is_refused(tmp_path: Path) -> None:
    refused = run("serve", "--host", "0.0.0.0", "--data-dir", str(tmp_path))
    assert refused.returncode == 2
    assert "takes TLS" in refused.stderr


def test_an_output_that_cannot_be_written(project: Path) -> None:
    (project / "taken").write_text("")
    refused = run("train", "train.py:f", "--steps", "1", "--output", "taken/inside", directory=project)
    assert refused.returncode == 2
    assert "--output" in refused.stderr


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    (tmp_path / "wide.py").write_text(
        "import steepest, torch\n"
        "def task(width=1000):\n"
        "    return steepest.Task(model=torch.nn.Linear(width, 1000), loss=torch.nn.CrossEntropyLoss(),\n"
        "        train_data=steepest.ArrayData(torch.zeros(8, width), torch.zeros(8, dtype=torch.long)))\n"
    )
    return tmp_path


def test_a_plan_shows_what_a_job_would_take_and_starts_nothing(wide: Path) -> None:
    shown = run("train", "wide.py:task", "--steps", "1", "--workers", "2", "--plan", "--json", directory=wide)
    assert shown.returncode == 0, shown.stderr
    assert "worker-1" in shown.stderr
    plan = json.loads(shown.stdout.splitlines()[-1])
    assert plan["num_parameters"] == 1_001_000
    assert plan["network"] == 0
    assert plan["servers"][0]["optimizer_state"] == 2 * plan["servers"][0]["parameters"]
    assert len(plan["workers"]) == 2
    assert "ray" not in shown.stderr.lower()


def test_a_plan_that_cannot_fit_is_refused_with_what_would(wide: Path) -> None:
    many = ["--workers", "1024", "--global-batch", "1024", "--micro-batch", "1", "--arg", "width=100000"]
    shown = run("train", "wide.py:task", "--steps", "1", "--plan", *many, directory=wide)
    assert shown.returncode == 2
    assert "the job needs" in shown.stderr
    assert "what would fit" in shown.stderr


def test_check_says_what_was_understood(wide: Path) -> None:
    shown = run("check", "wide.py:task", "--arg", "width=10", "--json", directory=wide)
    assert shown.returncode == 0, shown.stderr
    checked = json.loads(shown.stdout.splitlines()[-1])
    assert {"model", "parameters", "trainable", "batch", "weight", "warnings"} <= set(checked)
    assert (checked["model"], checked["parameters"], checked["trainable"]) == ("Linear", 11_000, 11_000)
    assert checked["batch"] == "(float32[8, 10], int64[8])"
    assert checked["weight"] == "8 for 8 samples"
    told = run("check", "wide.py:task", "--arg", "width=10", "--workers", "3", directory=wide)
    assert told.returncode == 0
    assert "Linear, 11,000 parameters are trained, 0 are frozen" in told.stdout
    assert "(idle_workers)" in told.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "best.metric=accuracy"], "best.metric"),
        (["--warmup-steps", "9", "--steps", "9"], "schedule.warmup_steps"),
        (["--set", "clip.agc.clipping=0.01", "--set", "clip.agc.exclude=head*"], "clip.agc.exclude"),
        (["--secret", "KEY=hub"], "secrets.KEY"),
    ],
)
def test_check_refuses_what_does_not_agree_with_the_task(wide: Path, options: list[str], words: str) -> None:
    refused = run("check", "wide.py:task", "--arg", "width=10", *options, directory=wide)
    assert refused.returncode == 2, refused.stdout
    assert words in refused.stderr


def test_check_without_a_length_has_room_for_a_warm_up(wide: Path) -> None:
    assert run("check", "wide.py:task", "--arg", "width=10", "--warmup-steps", "9", directory=wide).returncode == 0


def test_check_refuses_what_a_service_would(wide: Path) -> None:
    (wide / "bad.py").write_text(
        "import steepest, torch\n"
        "def task():\n"
        "    return steepest.Task(model=torch.nn.Linear(2, 2), loss=torch.nn.MSELoss(),\n"
        "        train_data=steepest.ArrayData(torch.zeros(8, 2), torch.zeros(8, 2)),\n"
        "        eval_data=steepest.ArrayData(torch.zeros(8, 2), torch.zeros(8, 2)),\n"
        "        metrics={'broken': lambda outputs, targets: outputs['x']})\n"
    )
    refused = run("check", "bad.py:task", directory=wide)
    assert refused.returncode == 2
    assert "evaluating 8 samples of eval_data raised" in refused.stderr
    assert "bad.py" in refused.stderr
