"""What is refused of a job before anything starts, without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from services.jobs.operations import Operations
from services.settings import Settings
from steepest.spec import spec_from_dict


def test_a_services_rules_hold_where_a_spec_does_not_name_them(tmp_path: Path) -> None:
    settings = Settings(data_directory=tmp_path, health_actions={"diverging": "pause", "stalled": "cancel"})
    unused: Any = None
    operations = Operations(unused, unused, unused, unused, unused, settings, unused)
    spec = spec_from_dict(
        {"task": {"module": "t", "function": "f"}, "steps": 1, "health": {"actions": {"stalled": "ignore"}}}
    )
    assert operations._with_rules(spec).health.actions == {"diverging": "pause", "stalled": "ignore"}
