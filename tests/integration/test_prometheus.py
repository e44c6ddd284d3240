"""A real Prometheus scrapes a running job; deploy/ speaks of series that exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.service import Service
from steepest.client import Client, Job
from tests.support.programs import need_program
from tests.support.service import free_port, until

pytestmark = pytest.mark.cluster

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
CONFIG = DEPLOY / "prometheus" / "prometheus.yml"
RULES = DEPLOY / "prometheus" / "rules.yml"
GRAFANA = DEPLOY / "grafana"
DASHBOARDS = ("steepest.json", "fleet.json", "service.json")


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return str(reply.read().decode())


@pytest.fixture
def query(service: Service, tmp_path: Path) -> Iterator[Callable[[str], dict[str, float]]]:
    """Asks a Prometheus that scrapes the service with the configuration in deploy/: series' labels -> value."""
    program = need_program("prometheus", "prometheus")
    config = tmp_path / "prometheus.yml"
    text = CONFIG.read_text()
    assert "127.0.0.1:8080" in text
    fast = text.replace("127.0.0.1:8080", f"127.0.0.1:{service.http_port}").replace("5s", "250ms")
    config.write_text(fast)
    (tmp_path / "rules.yml").write_text(RULES.read_text())
    port = free_port()
    process = subprocess.Popen(
        [
            program,
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def ask(expression: str) -> dict[str, float]:
        found = json.loads(_get(f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(expression)}"))
        assert found["status"] == "success"
        return {json.dumps(r["metric"], sort_keys=True): float(r["value"][1]) for r in found["data"]["result"]}

    def is_up() -> bool:
        try:
            return bool(ask("up == 1"))
        except OSError:
            return False

    try:
        until(is_up)
        yield ask
    finally:
        process.terminate()
        process.wait()


def test_what_prometheus_returns_is_what_the_history_says(
    query: Callable[[str], dict[str, float]], submit: Callable[..., Job]
) -> None:
    clip = {"norm": 0.3}
    job = submit("slow", name="watched", arguments={"delay": 0.01}, steps=1000, clip=clip, data={"global_batch": 24})
    until(lambda: job.get().step >= 30)
    job.pause()
    until(lambda: job.get().state == "PAUSED")
    history = list(job.history())
    last = history[-1]

    def value(name: str) -> float | None:
        found = query(f'{name}{{job="watched"}}')
        return next(iter(found.values()), None)

    until(lambda: value("steepest_job_step") == len(history))
    assert value("steepest_job_gradient_norm") == last["gradient_norm"]
    assert value("steepest_job_clipped_gradient_norm") == last["clipped_norm"]
    assert value("steepest_job_loss") == last["loss"]
    assert value("steepest_job_learning_rate") == last["lr"]
    assert value("steepest_job_samples_total") == sum(r["samples"] for r in history)
    clipped = sum(r["clipped"] for r in history)
    assert clipped > 0
    assert value("steepest_job_clipped_steps_total") == clipped
    assert value("steepest_job_steps_total") == len(history)
    assert value("steepest_job_step_seconds_count") == len(history)
    for expression in _expressions(*DASHBOARDS):
        asked = expression.replace("$job", "watched").replace("$__rate_interval", "1h")
        is_rare = any(name in expression for name in ("evaluation", "findings", "open_streams"))
        assert query(asked) or is_rare, asked
    job.cancel()
    until(lambda: not query('steepest_job_step{job="watched"}'), 400)


def _expressions(*names: str) -> list[str]:
    boards = [json.loads((GRAFANA / name).read_text()) for name in names]
    return [target["expr"] for board in boards for panel in board["panels"] for target in panel["targets"]]


@pytest.mark.full
def test_an_alert_fires_for_a_sick_job_and_resolves_when_it_ends(
    query: Callable[[str], dict[str, float]], client: Client
) -> None:
    spec: dict[str, Any] = {"optimizer": {"name": "sgd", "lr": 0.05}, "data": {"global_batch": 32}}
    job = client.submit("tests/support/sick.py:sigmoids", name="sick", steps=100_000, **spec)
    firing = 'ALERTS{alertname="SteepestVanishingGradient",job="sick",alertstate="firing"}'
    until(lambda: query(firing))
    job.cancel()
    until(lambda: job.get().has_ended)
    until(lambda: not query(firing), 400)


@pytest.mark.full
def test_the_layers_of_a_job_are_at_most_sixteen_series(
    query: Callable[[str], dict[str, float]], submit: Callable[..., Job]
) -> None:
    job = submit("deep", name="layered", steps=100_000)
    until(lambda: query('steepest_job_layer_gradient_norm{job="layered"}'))
    assert len(query('steepest_job_layer_gradient_norm{job="layered"}')) <= 16
    [total] = query('sqrt(sum by (job) (steepest_job_layer_gradient_norm{job="layered"} ^ 2))').values()
    assert total > 0
    job.cancel()


def test_promtool_accepts_and_tests_the_rules(service: Service) -> None:
    program = need_program("promtool", "prometheus")
    for arguments in (["check", "rules", str(RULES)], ["test", "rules", str(RULES.with_name("rules_test.yml"))]):
        checked = subprocess.run([program, *arguments], text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr + checked.stdout
    shown = _get(f"http://127.0.0.1:{service.http_port}/metrics")
    used = set(re.findall(r"\bsteepest_\w+", RULES.read_text()))
    assert used
    assert all(f"# TYPE {name} " in shown for name in used), used


LABELS = {"grpc_method", "grpc_code"}


def test_every_series_of_the_dashboards_is_exported(service: Service) -> None:
    shown = _get(f"http://127.0.0.1:{service.http_port}/metrics")
    exported: set[str] = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", shown, re.MULTILINE):
        suffixes = ["_bucket", "_sum", "_count"] if kind == "histogram" else [""]
        exported |= {name + suffix for suffix in suffixes}
    used = {n for e in _expressions(*DASHBOARDS) for n in re.findall(r"\b(?:steepest|grpc|process)_\w+", e)} - LABELS
    assert len(used) >= 12
    assert used <= exported
    for topic in (
        "gradient_norm",
        "clipped_gradient_norm",
        "clip",
        "loss",
        "learning_rate",
        "samples",
        "workers",
        "seconds",
    ):
        assert any(topic in name for name in used), topic


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_what_its_script_writes(name: str) -> None:
    code = f"import sys, make_dashboard; sys.stdout.write(make_dashboard.text_of({name!r}))"
    made = subprocess.run([sys.executable, "-c", code], cwd=GRAFANA, capture_output=True, text=True, check=True)
    assert made.stdout == (GRAFANA / name).read_text()


def test_promtool_accepts_the_configuration_and_the_metrics(service: Service) -> None:
    program = need_program("promtool", "prometheus")
    subprocess.run([program, "check", "config", str(CONFIG)], check=True, capture_output=True)
    shown = _get(f"http://127.0.0.1:{service.http_port}/metrics")
    checked: Any = subprocess.run([program, "check", "metrics"], input=shown, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr + checked.stdout


def test_healthz(service: Service) -> None:
    assert _get(f"http://127.0.0.1:{service.http_port}/healthz") == "ok\n"
