"""``usp completions``: what a shell needs to complete the commands and their options."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from usp.cli.console import Exit, UserError

if TYPE_CHECKING:
    from usp.cli.console import Commands

SHELLS = ("bash", "zsh", "fish")


def add_arguments(commands: Commands) -> argparse.ArgumentParser:
    """Describe ``usp completions`` to the parser of the command line."""
    parser = commands.add_parser(
        "completions", help="print a script that lets a shell complete usp's commands and options"
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Print the script of ``arguments.parser``, made once: completing starts no Python."""
    try:
        import shtab
    except ImportError:
        raise UserError("this needs shtab: pip install 'usp[completions]'") from None
    print(shtab.complete(arguments.parser, arguments.shell))
    return Exit.RIGHT
