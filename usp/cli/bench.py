"""``usp bench``: list the programs that measure, or run one."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from usp.bench import PROGRAMS
from usp.bench import run as run_program
from usp.bench.options import BenchError
from usp.cli.console import PACKAGE, UserError, check_file, table

if TYPE_CHECKING:
    from usp.cli.console import Commands


def add_arguments(commands: Commands) -> argparse.ArgumentParser:
    """Describe ``usp bench`` to the parser of the command line."""
    parser = commands.add_parser(
        "bench",
        help="measure: kernels, rings, links; no NAME: list them",
        epilog="usp bench NAME --help explains one: " + ", ".join(PROGRAMS),
    )
    parser.add_argument("name", nargs="?", help="the program; none: list them")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="its own arguments")
    return parser


def source_programs() -> dict[str, Path]:
    """Those of ``benchmarks/``, where this usp, or the current folder, is a source tree."""
    for root in (PACKAGE.parent, Path.cwd()):
        if (root / "benchmarks").is_dir() and (root / "pyproject.toml").is_file():
            paths = sorted((root / "benchmarks").glob("[a-z]*.py"))
            return {path.stem: path for path in paths if path.stem not in PROGRAMS}
    return {}


def run(arguments: argparse.Namespace) -> int:
    """Those of the package run here, those of the source tree in a process of their own."""
    theirs = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # an option of them all
    theirs.add_argument("--json", nargs="?")
    check_file("json", theirs.parse_known_args(arguments.rest)[0].json)
    if arguments.name in PROGRAMS:
        try:
            return run_program(arguments.name, arguments.rest)
        except BrokenPipeError:
            raise
        except (BenchError, OSError) as error:  # a file that cannot be written
            raise UserError(str(error)) from error
    programs = source_programs()
    if arguments.name is None:
        print(table(PROGRAMS.items()))
        if programs:
            print("\nof the source tree")
            print(table((name, _first_line(path)) for name, path in programs.items()))
        return 0
    if arguments.name not in programs:
        names = ", ".join((*PROGRAMS, *programs))
        more = "" if programs else "; more come with the sources"
        raise UserError(f"no benchmark {arguments.name!r}: there are {names}{more}")
    command = [sys.executable, str(programs[arguments.name]), *arguments.rest]
    return subprocess.run(command, check=False).returncode


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
