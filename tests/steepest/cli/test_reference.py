"""One description of every field: help, documentation and the .proto file agree."""

from __future__ import annotations

from pathlib import Path

from steepest.cli.reference import BEGIN, docs, proto
from steepest.spec_fields import describe_fields
from tests.support.command import run

ROOT = Path(__file__).parent.parent.parent.parent


def test_every_field_is_described_in_a_sentence() -> None:
    for field in describe_fields():
        assert field.description[0].isupper() or field.description.split()[0].rstrip(":,") in ("full", "auto"), field
        assert field.description.endswith("."), field


def test_the_documentation_and_the_proto_file_are_up_to_date() -> None:
    jobs = (ROOT / "docs" / "jobs.md").read_text()
    messages = (ROOT / "proto" / "steepest" / "v1" / "training_jobs.proto").read_text()
    assert docs(jobs) == jobs, "run `make reference`"
    assert proto(messages) == messages, "run `make reference`"


def test_a_changed_description_is_noticed() -> None:
    jobs = (ROOT / "docs" / "jobs.md").read_text()
    assert docs(jobs.replace("Samples of one step", "Something else")) == jobs
    assert BEGIN in jobs
    messages = (ROOT / "proto" / "steepest" / "v1" / "training_jobs.proto").read_text()
    assert proto(messages.replace("// Samples of one step.", "// Something else.")) == messages


def test_the_help_shows_description_and_default() -> None:
    shown = " ".join(run("train", "--help").stdout.replace("│", " ").split())
    assert "Samples of one step (default: 64)." in shown
    expected = "torch.optim's; 0.001 for sgd, momentum and nesterov; none for a class"
    assert f"Learning rate before the schedule (default: {expected})." in shown
