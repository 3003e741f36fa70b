"""``usp doctor``: whether backends and ranks compute and talk rightly, and what to do if not."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch

from usp.cli.console import Exit, UserError, add_json, check_seconds, present, table
from usp.diagnosis.examine import Examination, examine
from usp.diagnosis.ranks import Local, on_ranks
from usp.diagnosis.report import LEFT_OUT, RIGHT, RankReport, Report
from usp.distributed.launch import default_device_type
from usp.ops import native

if TYPE_CHECKING:
    from usp.cli.console import Commands

START_SECONDS, CHECKS = 60.0, 40


def add_arguments(commands: Commands) -> argparse.ArgumentParser:
    """Describe ``usp doctor`` to the parser of the command line."""
    parser = commands.add_parser(
        "doctor",
        help="check every backend, collective and transport here, and say what is wrong",
        description="Runs on the ranks of torchrun or srun where one of these started it, else on "
        "processes of this machine.",
    )
    add_rank_options(parser)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="how long a check may take (default 20)"
    )
    add_json(parser)
    return parser


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """Of a command that has ranks."""
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="processes to start; default 4, or one a GPU"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: GPUs where there are two or more"
    )


def run(arguments: argparse.Namespace) -> int:
    """0: all is right. 1: something is not. 3: some rank did not answer."""
    check_seconds(arguments.seconds)
    device, ranks = chosen_ranks(arguments)
    task = Examination(device, arguments.seconds)
    local = Local(ranks, device, START_SECONDS + CHECKS * arguments.seconds)
    try:
        found = on_ranks(examine, task, local, grace=2 * arguments.seconds)
    except ValueError as error:
        raise UserError(str(error)) from error
    if found is None:
        return Exit.RIGHT  # the first rank says it for all
    texts, failure = found
    report = Report([None if t is None else RankReport.of_text(t) for t in texts], failure)
    told = {**report.told(), "notes": notes()}
    present(arguments, told, lambda: text(report))
    if report.is_silent:
        return Exit.NO_ANSWER
    return Exit.WRONG if report.sentences() else Exit.RIGHT


def chosen_ranks(arguments: argparse.Namespace) -> tuple[str, int]:
    """Device type and number of ranks, where no launcher says it.

    Raises:
        UserError: there are not so many devices; names both numbers.
    """
    gpus = torch.cuda.device_count()
    device = arguments.device or (default_device_type() if gpus > 1 else "cpu")
    ranks = arguments.ranks if arguments.ranks is not None else (4 if device == "cpu" else gpus)
    if ranks < 1:
        raise UserError(f"--ranks must be 1 or more, got {ranks}")
    if device != "cpu" and ranks > gpus:
        raise UserError(f"--ranks {ranks} of --device {device} need a GPU each, there are {gpus}")
    return device, ranks


def notes() -> list[str]:
    """What is not wrong, and could be better."""
    missing = native.load_error()
    return [] if missing is None else [f"no compiled kernels: {missing}. usp info says more."]


def text(report: Report) -> str:
    """All of it, for a person."""
    who = [(r.rank, r.about["host"], r.about["device"], r.about["torch"]) for r in report.answered]
    parts = [table([("rank", "host", "device", "torch"), *who])]
    rows: list[tuple[object, ...]] = [("check", "", "seconds", "")]
    for check, outcomes in report.checks().items():
        states = list(dict.fromkeys(outcome.state for _, outcome in outcomes))
        seconds = max(outcome.seconds for _, outcome in outcomes)
        is_well = set(states) <= {RIGHT, LEFT_OUT}
        said = outcomes[0][1].said if is_well else ""  # what is not stands below
        rows.append((check, ", ".join(states), f"{seconds:.2f}", said))
    parts.append(table(rows))
    if report.links:
        links = [
            (f"{a} - {b}", f"{1e6 * link.latency:.0f}", f"{link.rate / 1e9:.2f}")
            for link in report.links
            for a, b in (link.ranks,)
        ]
        heading = ("ranks", "microseconds", "GB/s each way")
        parts.append("links, both ways at once\n" + table([heading, *links]))
    parts += notes()
    parts.append("\n".join(report.sentences()) or f"all is right on {len(report.ranks)} ranks")
    return "\n\n".join(parts)
