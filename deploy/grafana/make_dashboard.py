"""Writes steepest.json, the Grafana dashboard: `python deploy/grafana/make_dashboard.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
JOB = '{job=~"$job"}'
WIDTH, HEIGHT = 12, 8

# Each: title, unit, and pairs of legend and expression.
PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Gradient norm, raw and clipped",
        "none",
        (
            ("{{job}} raw", f"steepest_job_gradient_norm{JOB}"),
            ("{{job}} clipped", f"steepest_job_clipped_gradient_norm{JOB}"),
        ),
    ),
    ("Loss", "none", (("{{job}}", f"steepest_job_loss{JOB}"),)),
    (
        "Share of steps that were clipped",
        "percentunit",
        (
            (
                "{{job}}",
                (
                    f"rate(steepest_job_clipped_steps_total{JOB}[$__rate_interval]) "
                    f"/ rate(steepest_job_steps_total{JOB}[$__rate_interval])"
                ),
            ),
        ),
    ),
    ("Clip ratio of the last step", "percentunit", (("{{job}}", f"steepest_job_clip_ratio{JOB}"),)),
    ("Evaluation", "none", (("{{job}} {{metric}}", f"steepest_job_evaluation{JOB}"),)),
    ("Learning rate", "sci", (("{{job}}", f"steepest_job_learning_rate{JOB}"),)),
    (
        "Throughput",
        "none",
        (("{{job}} samples/s", f"rate(steepest_job_samples_total{JOB}[$__rate_interval])"),),
    ),
    (
        "Step time",
        "s",
        (
            (
                "{{job}} median",
                f"histogram_quantile(0.5, rate(steepest_job_step_seconds_bucket{JOB}[$__rate_interval]))",
            ),
            (
                "{{job}} 99th percentile",
                f"histogram_quantile(0.99, rate(steepest_job_step_seconds_bucket{JOB}[$__rate_interval]))",
            ),
        ),
    ),
    (
        "Progress",
        "percentunit",
        (("{{job}}", f"steepest_job_step{JOB} / steepest_job_planned_steps{JOB}"),),
    ),
    (
        "Workers",
        "none",
        (
            ("{{job}}", f"steepest_job_workers{JOB}"),
            ("{{job}} replaced", f"increase(steepest_job_replaced_workers_total{JOB}[1h])"),
        ),
    ),
    ("Skipped steps in the last hour", "none", (("{{job}}", f"increase(steepest_job_skipped_steps_total{JOB}[1h])"),)),
    ("Jobs by state", "none", (("{{state}}", "steepest_jobs"),)),
)


def panel(number: int, title: str, unit: str, targets: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """One time series panel, two to a row."""
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": DATASOURCE,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": number % 2 * WIDTH, "y": number // 2 * HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": expression, "legendFormat": legend, "datasource": DATASOURCE}
            for i, (legend, expression) in enumerate(targets)
        ],
    }


def dashboard() -> dict[str, Any]:
    """The whole dashboard."""
    return {
        "uid": "steepest",
        "title": "steepest",
        "schemaVersion": 39,
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                {
                    "name": "job",
                    "type": "query",
                    "datasource": DATASOURCE,
                    "query": {"query": "label_values(steepest_job_step, job)", "refId": "job"},
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                },
            ]
        },
        "panels": [panel(i, *each) for i, each in enumerate(PANELS)],
    }


if __name__ == "__main__":
    text = json.dumps(dashboard(), indent=2) + "\n"
    (Path(__file__).parent / "steepest.json").write_text(text)
