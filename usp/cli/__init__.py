"""The ``usp`` command."""

from usp.cli.command import main

__all__ = ["main"]
