"""``usp demo``: four processes against one, on a real picture."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from usp.cli.console import Exit, NoAnswer, UserError, add_json, present
from usp.demo import Refused, add_options, run_demo
from usp.distributed.processes import ProcessFailed

if TYPE_CHECKING:
    from usp.cli.console import Commands


def add_arguments(commands: Commands) -> argparse.ArgumentParser:
    """Describe ``usp demo`` to the parser of the command line."""
    parser = commands.add_parser(
        "demo",
        help="four processes against one, on a real picture",
        description="A vision transformer on a real picture: one process with "
        "nn.MultiheadAttention beside several with usp.MultiheadAttention, same weights.",
    )
    add_options(parser)
    add_json(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """0: both runs agree. 1: they do not. 2: it could not start. 3: a process failed."""
    try:
        found = run_demo(arguments, to_stderr=arguments.json == "-")
    except Refused as error:
        raise UserError(str(error)) from error
    except ProcessFailed as error:
        print(error.details, file=sys.stderr)
        raise NoAnswer(str(error)) from error
    told = {"right": not found.wrong, **found.told}
    present(arguments, told, lambda: f"wrong: {found.wrong}" if found.wrong else "it is the same")
    return Exit.WRONG if found.wrong else Exit.RIGHT
