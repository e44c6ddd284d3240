"""How long the page of a large and long job takes to open: 10,000 parameters, 100,000 steps.

`python -m benchmarks.wide_page [--parameters 10000] [--steps 100000] [--rounds 5] [--json FILE]`. A job of two steps is
trained through a service, and the records of as many steps as wanted are written to its history as the service writes
them (8 GB by default). Then Chromium opens the page, in new contexts; a figure is the median, from the request until
curves and the view of all layers are drawn. The files are in the page cache. Also measured: each of the page's own
requests, and what one more tick of the page transfers.
"""

from __future__ import annotations

import os

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import argparse
import http.client
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright

import steepest
from benchmarks.report import RESULTS, write_report
from ps.step.messages import StepRecord
from ps.step.signals import FIRST_STEPS, NAMES
from services.store.history import JobHistory
from steepest.embedded import running_service

REPORT, SIGNALS_EVERY = 250, 20


def _fill(history: JobHistory, first: int, steps: int, parameters: int) -> None:
    """Write records as a long job leaves them."""
    generator = np.random.default_rng(0)
    norms = generator.lognormal(size=(REPORT, parameters))
    signals = generator.lognormal(size=len(NAMES) * parameters).tobytes()
    history.begin(2, first)
    for low in range(first, steps, REPORT):
        history.append(
            2,
            [
                StepRecord(
                    step, 1e9 + step, 2.0 / (1 + step) ** 0.1, 1e-3, 64.0, 64, 2.0, 1.0, 0.5, True, False, 2, 0.1, 0.08,
                    0.01, 0.01, norms[step - low].tobytes(),
                    signals=signals if step < FIRST_STEPS or step % SIGNALS_EVERY == 0 else b"",
                )
                for step in range(low, min(low + REPORT, steps))
            ],
        )  # fmt: skip


def _get(port: int, path: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", f"/api/jobs/wide{path}")
    return connection.getresponse()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS / "wide_page.json")
    options = parser.parse_args()
    found: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory() as directory,
        running_service(Path(directory), grpc_port=0, http_port=0, num_cpus=2) as service,
        steepest.Client(f"127.0.0.1:{service.grpc_port}") as client,
    ):
        service.cluster.wait_ready()
        job = client.submit(
            "benchmarks/tasks.py:wide", name="wide", arguments={"count": options.parameters}, steps=2,
            optimizer={"name": "sgd", "lr": 1e-9},
        )  # fmt: skip
        job.wait()
        began = time.perf_counter()
        history = JobHistory(service.settings.history_of("wide"))
        _fill(history, 2, options.steps, options.parameters)
        found["fill_seconds"] = time.perf_counter() - began
        own = f"http://127.0.0.1:{service.http_port}"
        for path in ("", "/series?names=loss,gradient_norm,lr,step_seconds", "/layers?points=300", "/noise",
                     "/layers?points=300&signal=update_ratio", "/layers?name=parts.77"):  # fmt: skip
            taken = []
            for _ in range(options.rounds):
                began = time.perf_counter()
                size = len(_get(service.http_port, path).read())
                taken.append(time.perf_counter() - began)
            found[f"GET {path or '/'}"] = statistics.median(taken)
            found[f"bytes {path or '/'}"] = size
        stream = _get(service.http_port, f"/live?cursor={options.steps - 1}:0:0")
        found["tick_bytes"] = len(stream.readline() + stream.readline())
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
            taken = []
            for _ in range(options.rounds + 1):  # the first one starts the browser's processes
                page = browser.new_context().new_page()
                began = time.perf_counter()
                page.goto(f"{own}/jobs/wide")
                page.wait_for_function(
                    "() => document.querySelector('.scale span')?.textContent"
                    " && document.querySelector('[data-chart=loss] canvas')"
                )
                taken.append(time.perf_counter() - began)
                page.close()
            found["page_seconds"] = statistics.median(taken[1:])
            browser.close()
    for name, value in found.items():
        print(f"{name:55} {value:.4g}")
    write_report(options.json, **found)


if __name__ == "__main__":
    main()
