"""The command that runs the service, and its settings: of flags, the environment and a file, in this order."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
from pathlib import Path
from typing import Annotated

from typer import Option

from steepest.cli.common import app, prepare_for_embedded_ray
from steepest.errors import SpecError, Violation

_PORTS, _STORE, _CLUSTER, _JOBS = "Its ports, and who may ask", "What it keeps", "Where jobs run", "What jobs may do"


@app.command(rich_help_panel="The service")
def serve(
    config: Annotated[
        Path | None,
        Option(
            envvar="STEEPEST_CONFIG",
            metavar="FILE",
            help="TOML file of settings, by the names of these flags: http_port = 8081.",
        ),
    ] = None,
    host: Annotated[
        str | None,
        Option(metavar="HOST", help="Address of both ports.", show_default="127.0.0.1", rich_help_panel=_PORTS),
    ] = None,
    port: Annotated[
        int | None,
        Option(metavar="PORT", help="gRPC port; 0: any free one.", show_default="50051", rich_help_panel=_PORTS),
    ] = None,
    http_port: Annotated[
        int | None,
        Option(
            metavar="PORT",
            help="HTTP port: the page, /metrics, /healthz.",
            show_default="8080",
            rich_help_panel=_PORTS,
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        Option(metavar="FILE", help="PEM: the certificate of both ports, with its chain.", rich_help_panel=_PORTS),
    ] = None,
    tls_key: Annotated[
        Path | None, Option(metavar="FILE", help="PEM: the certificate's private key.", rich_help_panel=_PORTS)
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="PEM: the authority that has to have signed the certificate of every caller.",
            rich_help_panel=_PORTS,
        ),
    ] = None,
    calls_per_second: Annotated[
        float | None,
        Option(
            metavar="N",
            help="How often one caller may ask on average: a token, or a host while there is none. 0: as often as they "
            "like.",
            show_default="500",
            rich_help_panel=_PORTS,
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        Option(
            metavar="DIR",
            help="Where jobs and checkpoints are kept.",
            show_default="steepest-data",
            rich_help_panel=_STORE,
        ),
    ] = None,
    database_url: Annotated[
        str | None,
        Option(
            metavar="URL",
            help="postgresql://... to keep jobs in; else SQLite in the data directory.",
            rich_help_panel=_STORE,
        ),
    ] = None,
    retention_days: Annotated[
        float | None,
        Option(
            metavar="DAYS",
            help="Delete jobs so many days after they ended; 0: never.",
            show_default="0",
            rich_help_panel=_STORE,
        ),
    ] = None,
    secrets_dir: Annotated[
        Path | None,
        Option(
            metavar="DIR",
            help="Secrets that jobs may name, a file each; those in a folder there are for the owner of that name.",
            rich_help_panel=_STORE,
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        Option(metavar="ADDRESS", help="An existing Ray cluster; else Ray starts embedded.", rich_help_panel=_CLUSTER),
    ] = None,
    cpus: Annotated[
        int | None,
        Option(
            metavar="N",
            help="CPUs that embedded Ray may hand out.",
            show_default="at least 8",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    exchange_tls: Annotated[
        bool | None,
        Option(
            "--exchange-tls/--no-exchange-tls",
            help="Whether what processes of a job tell each other between hosts is under TLS. On one host it goes "
            "through memory.",
            show_default="as the ports",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    preemption: Annotated[
        bool | None,
        Option(
            "--preemption/--no-preemption",
            help="Whether a running job gives its room to a waiting one of higher priority, at a step boundary and "
            "with a checkpoint, and goes on from there later.",
            show_default="no",
            rich_help_panel=_JOBS,
        ),
    ] = None,
    requirements: Annotated[
        bool | None,
        Option(
            "--requirements/--no-requirements",
            help="Whether jobs may name packages, which pip gets from its index as wheels and which go along with the "
            "job's code.",
            show_default="yes",
            rich_help_panel=_JOBS,
        ),
    ] = None,
    health_action: Annotated[
        list[str] | None,
        Option(
            metavar="RULE=ACTION",
            help="What a health rule does in jobs that do not say so; repeatable.",
            rich_help_panel=_JOBS,
        ),
    ] = None,
) -> None:
    """Run the service: gRPC for jobs, HTTP for the page and Prometheus.

    On loopback it is open to all on this machine until there is a token (steepest token create). On any other address
    it takes TLS and a token. Every flag is also a setting: STEEPEST_HTTP_PORT=8081 in the environment, http_port = 8081
    in the file of --config; a flag comes before the environment, and that before the file.
    """
    given = {
        "host": host,
        "port": port,
        "http_port": http_port,
        "data_dir": data_dir,
        "database_url": database_url,
        "ray_address": ray_address,
        "cpus": cpus,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "tls_client_ca": tls_client_ca,
        "retention_days": retention_days,
        "preemption": preemption,
        "secrets_dir": secrets_dir,
        "requirements": requirements,
        "calls_per_second": calls_per_second,
        "exchange_tls": exchange_tls,
        "health_actions": _actions(health_action or []) or None,
    }
    prepare_for_embedded_ray()
    # A script that starts it in the background has it ignore this one, and a service is to end well with either.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import threading

    from steepest.embedded import running_service, serve_settings

    settings = serve_settings(config, {name: value for name, value in given.items() if value is not None})
    with running_service(settings.data_dir, **settings.of_service()) as service:
        scheme = "http" if settings.tls_cert is None else "https"
        ports = f"gRPC {settings.host}:{service.grpc_port}  HTTP {scheme}://{settings.host}:{service.http_port}"
        sys.stderr.write(f"{ports}  data {settings.data_dir}\n")
        sys.stderr.flush()
        with contextlib.suppress(KeyboardInterrupt):
            service.cluster.wait_ready()
            gc.freeze()  # a collection takes 0.2 s of what is there by now, and nobody is answered meanwhile
            sys.stderr.write("ready\n")
            sys.stderr.flush()
            threading.Event().wait()
        kept = service.settings.ray_address is not None
        later = "; the next service goes on with them" if kept else " from their last checkpoint at the next start"
        sys.stderr.write(f"stopping; jobs that run go on{later}\n")


def _actions(texts: list[str]) -> dict[str, str]:
    """What --health-action says. Raises SpecError."""
    found = {}
    for text in texts:
        rule, equals, action = text.partition("=")
        if not equals:
            raise SpecError([Violation("--health-action", f"{text!r}; write RULE=ACTION, such as diverging=pause")])
        found[rule.strip()] = action.strip()
    return found
