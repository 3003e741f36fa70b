"""The ``usp`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from usp._version import __version__
from usp.cli import bench, completions, demo, doctor, info, plan, trace, tune, verify
from usp.cli.console import Exit, NoAnswer, UserError, check_file

# In the order in which a person meets them.
COMMANDS = (info, doctor, demo, verify, plan, trace, tune, bench, completions)
CODES = (
    "exit codes: 0 right, 1 something wrong was found, 2 it cannot be done as asked, 3 a process "
    "died or did not answer in time. docs/command_line.md"
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="usp",
        description="Exact attention over sequences that do not fit one device.",
        epilog=CODES,
    )
    parser.set_defaults(parser=parser)
    parser.add_argument("--version", action="version", version=f"usp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for module in COMMANDS:
        module.add_arguments(commands).set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        for option in ("json", "png"):
            check_file(option, getattr(arguments, option, None))
        return int(arguments.run(arguments) or Exit.RIGHT)
    except UserError as error:
        return _fail(Exit.USAGE, error)
    except NoAnswer as error:
        return _fail(Exit.NO_ANSWER, error)
    except BrokenPipeError:  # `usp plan --show | head`
        sys.stderr.close()
        return Exit.BROKEN_PIPE
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


def _fail(code: Exit, error: Exception) -> int:
    print(f"usp: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
