"""`steepest doctor`: what of this machine and service works, and how to mend what does not."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from typer import Option

from steepest.cli.common import DEFAULT_SERVER, EXIT_JOB, Json, Server, app


@app.command(rich_help_panel="The service")
def doctor(
    server: Server = DEFAULT_SERVER,
    ray_address: Annotated[str | None, Option(help="An existing Ray cluster to look at, too.")] = None,
    as_json: Json = False,
) -> None:
    """Say what of this machine, cluster and service works, and how to mend what does not.

    Exit code 1 if something does not.
    """
    from steepest.doctor import examine

    findings = examine(server, ray_address)
    if as_json:
        whole = {"healthy": all(f.status != "fail" for f in findings), "checks": [f._asdict() for f in findings]}
        sys.stdout.write(json.dumps(whole) + "\n")
    else:
        for finding in findings:
            sys.stdout.write(f"{finding.status:4}  {finding.name:12}  {finding.message}\n")
            if finding.cure:
                sys.stdout.write(f"{'':20}{finding.cure}\n")
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(EXIT_JOB)
