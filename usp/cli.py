"""The ``usp`` command: ``info``, ``plan``, ``bench``, ``demo``."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from usp import cli_plan
from usp._version import __version__
from usp.cli_plan import table

PACKAGE = Path(__file__).resolve().parent


class UserError(Exception):
    """What the user can mend: shown as one line, exit code 2."""


def build_lines() -> list[tuple[str, str]]:
    """What is known of the compiled extension: what was built, and what runs here."""
    record_file = PACKAGE / "_build.json"
    record = json.loads(record_file.read_text()) if record_file.is_file() else {}
    try:
        extension = importlib.import_module("usp._C")
    except ImportError as error:
        reason = record.get("reason") or f"{error} (USP_BUILD=none, or run from plain sources)"
        return [("extension", f"not built: {reason}")]
    built = extension.build_info()
    names = [name for name, there in built["targets"].items() if there]
    lines = [("extension", f"built for {', '.join(names)}")]
    if record:
        lines.append(("", f"by {record['compiler']}, beside torch {record['torch']}"))
    if built["architectures"]:
        by = f", by {record['device_compiler']}" if "device_compiler" in record else ""
        lines.append((f"{names[-1]} kernels for", f"{', '.join(built['architectures'])}{by}"))
    for kind, reason in record.get("left_out", {}).items():
        lines.append((f"{kind} kernels", f"not built: {reason}"))
    lines.append(("CPU kernels use", extension.cpu_capability()))
    return lines


def device_lines() -> list[tuple[str, str]]:
    """The devices torch sees."""
    import torch

    lines = [("devices", f"cpu: {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        lines.append(("", f"cuda:{index}: {torch.cuda.get_device_name(index)}"))
    return lines


def preference_lines() -> list[tuple[str, str]]:
    """What "auto" asks, in order, on each kind of device that is here."""
    import torch

    from usp.backends import in_order, preference
    from usp.kernels import architecture

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    lines = {}
    for name in map(architecture, devices):
        order = ", ".join(backend.NAME for backend in in_order(name))
        measured = preference(name).results
        lines[name] = order if measured else f"{order}  (a guess: not measured)"
    return list(lines.items())


def info(_: argparse.Namespace) -> int:
    import torch

    import usp

    lines = [
        ("usp", f"{__version__}  ({PACKAGE})"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", str(torch.__version__)),
        *build_lines(),
        *device_lines(),
    ]
    print(table(lines, indent=""))
    print("\nbackends")
    print(table(usp.backends().items()))
    print('\nbackend="auto" takes the first that can')
    print(table(preference_lines()))
    return 0


def demo(arguments: argparse.Namespace) -> int:
    from usp.demo import main as run

    return run(arguments.rest)


def plan(arguments: argparse.Namespace) -> int:
    try:
        print(cli_plan.report(arguments))
    except (ValueError, NotImplementedError) as error:  # refusals of the planner
        raise UserError(str(error)) from error
    return 0


def benchmark_folder() -> Path:
    """`benchmarks/` of the source tree that this usp, or the current folder, belongs to."""
    for root in (PACKAGE.parent, Path.cwd()):
        if (root / "benchmarks").is_dir() and (root / "pyproject.toml").is_file():
            return root / "benchmarks"
    raise UserError("no benchmarks/ folder here: it comes with the sources, run usp bench there")


def bench(arguments: argparse.Namespace) -> int:
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


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="usp", description="Exact attention over sequences that do not fit one device."
    )
    parser.add_argument("--version", action="version", version=f"usp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> None:
        commands.add_parser(name, help=text).set_defaults(run=run)

    add("info", info, "version, compiled extension, devices, backends")
    cli_plan.add_arguments(commands).set_defaults(run=plan)
    runner = commands.add_parser("bench", help="list the benchmark programs, or run one")
    runner.set_defaults(run=bench)
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


if __name__ == "__main__":
    sys.exit(main())
