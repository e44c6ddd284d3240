"""The `steepest` command."""

from steepest.cli.command import main
from steepest.cli.common import app

from steepest.cli import doctor, records, serve, service, study, sweep, tokens  # isort: skip  # in the order in which --help shows them

__all__ = ["app", "doctor", "main", "records", "serve", "service", "study", "sweep", "tokens"]
