"""``usp bench``: list the benchmark programs of the source tree, or run one."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from usp.cli.console import PACKAGE, UserError, table

if TYPE_CHECKING:
    from usp.cli.console import Commands


def add_arguments(commands: Commands) -> argparse.ArgumentParser:
    """Describe ``usp bench`` to the parser of the command line."""
    parser = commands.add_parser("bench", help="list the benchmark programs, or run one")
    parser.add_argument("name", nargs="?", help="the program; none: list them")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="its own arguments")
    return parser


def benchmark_folder() -> Path:
    """`benchmarks/` of the source tree that this usp, or the current folder, belongs to."""
    for root in (PACKAGE.parent, Path.cwd()):
        if (root / "benchmarks").is_dir() and (root / "pyproject.toml").is_file():
            return root / "benchmarks"
    raise UserError("no benchmarks/ folder here: it comes with the sources, run usp bench there")


def run(arguments: argparse.Namespace) -> int:
    programs = {path.stem: path for path in sorted(benchmark_folder().glob("[a-z]*.py"))}
    if arguments.name is None:
        if not programs:
            raise UserError("benchmarks/ holds no programs yet")
        documented = {
            name: ast.get_docstring(ast.parse(p.read_text())) for name, p in programs.items()
        }
        print(table((name, (text or "").partition("\n")[0]) for name, text in documented.items()))
        return 0
    if arguments.name not in programs:
        raise UserError(
            f"no benchmark {arguments.name!r}: there are {', '.join(programs) or 'none'}"
        )
    command = [sys.executable, str(programs[arguments.name]), *arguments.rest]
    return subprocess.run(command, check=False).returncode
