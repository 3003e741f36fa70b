"""The ``usp`` command: ``info``, ``plan``, ``verify``, ``tune``, ``bench``, ``demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from usp._version import __version__
from usp.cli import bench, info, plan, tune, verify
from usp.cli.console import UserError


def demo(arguments: argparse.Namespace) -> int:
    from usp.demo import main as run

    return run(arguments.rest)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="usp", description="Exact attention over sequences that do not fit one device."
    )
    parser.add_argument("--version", action="version", version=f"usp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> None:
        commands.add_parser(name, help=text).set_defaults(run=run)

    add("info", info.run, "version, compiled extension, devices, backends")
    plan.add_arguments(commands).set_defaults(run=plan.run)
    verify.add_arguments(commands).set_defaults(run=verify.run)
    tune.add_arguments(commands).set_defaults(run=tune.run)
    runner = commands.add_parser("bench", help="list the benchmark programs, or run one")
    runner.set_defaults(run=bench.run)
    runner.add_argument("name", nargs="?", help="the program; none: list them")
    runner.add_argument("rest", nargs=argparse.REMAINDER, help="its own arguments")
    show = commands.add_parser(
        "demo", add_help=False, help="four processes against one, on a real image (usp demo --help)"
    )
    show.set_defaults(run=demo)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.run is demo:
        arguments.rest = rest
    elif rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        return int(arguments.run(arguments) or 0)
    except UserError as error:
        print(f"usp: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `usp plan --show | head`
        sys.stderr.close()
        return 141
    except KeyboardInterrupt:
        return 130
