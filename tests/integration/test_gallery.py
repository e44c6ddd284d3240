"""What the gallery says of gradients holds, and its page knows all its parts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from steepest.client import Client, Job
from steepest.records import Records, records_of
from tests.support.choices import full

pytestmark = pytest.mark.cluster

GALLERY, DOCS = Path("examples/gallery"), Path("docs")


def trained(client: Client, task: str, arguments: dict[str, Any], **spec: Any) -> tuple[Job, Records]:
    job = client.submit(f"{GALLERY}/{task}", arguments=arguments, **spec)
    for _ in job.watch():
        pass  # until it has ended, well or not
    return job, records_of(job.history(signals=True))


@pytest.mark.parametrize(
    ("activation", "least", "most", "rules"),
    [("sigmoid", 0.0, 1e-7, {"vanishing"}), ("relu", 0.1, 10.0, set()), full("tanh", 0.1, 10.0, set())],
)
def test_gradients_vanish_behind_forty_sigmoids_and_not_behind_what_replaced_them(
    client: Client, activation: str, least: float, most: float, rules: set[str]
) -> None:
    arguments = {"activation": activation, "depth": 40}
    job, records = trained(client, "depth.py:network", arguments, steps=15, optimizer={"name": "sgd", "lr": 1e-3})
    ratio = records.norms["0.weight"][0] / records.norms["78.weight"][0]
    assert least < ratio < most
    assert rules <= {finding.rule for finding in job.get().findings}
    assert ("vanishing" in {finding.rule for finding in job.get().findings}) == ("vanishing" in rules)


def test_a_recurrent_network_diverges_unless_its_gradient_is_clipped(client: Client) -> None:
    spec: dict[str, Any] = {
        "steps": 200,
        "data": {"global_batch": 32, "micro_batch": 32},
        "optimizer": {"name": "sgd", "lr": 0.01},
    }
    free, lost = trained(client, "clipping.py:mean", {}, **spec)
    assert not lost.columns["loss"][-1] < 1e6
    assert {"diverging", "nonfinite"} & {finding.rule for finding in free.get().findings}
    clipped, kept = trained(client, "clipping.py:mean", {}, **spec, clip={"norm": 1.0})
    assert kept.columns["loss"][-20:].mean() < 0.05
    assert not clipped.get().findings


def test_every_link_to_the_gallery_leads_to_one_of_its_parts() -> None:
    page = (DOCS / "gallery.md").read_text()
    titles = re.findall(r"^## (.*)$", page, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    linked = set(re.findall(r"\(gallery\.md#([^)]*)\)", (DOCS / "gradients.md").read_text()))
    assert linked <= anchors
    for figure in re.findall(r"\]\((gallery/[^)]*)\)", page):
        assert (DOCS / figure).is_file()
    assert {f"{path.stem}.svg" for path in GALLERY.glob("*.py")} - {"common.svg", "make.svg"} == {
        path.name for path in (DOCS / "gallery").glob("*.svg")
    }
