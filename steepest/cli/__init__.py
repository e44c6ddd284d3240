"""The `steepest` command."""

from steepest.cli.command import app, main

__all__ = ["app", "main"]
