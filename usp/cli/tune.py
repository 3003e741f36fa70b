"""``usp tune``: measure every backend on this machine, and let the fastest come first."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from usp.cli.console import Exit, UserError, add_json, check_seconds, present, table

if TYPE_CHECKING:
    from usp.backends import Tuned
    from usp.cli.console import Commands


def add_arguments(commands: Commands) -> argparse.ArgumentParser:
    """Describe ``usp tune`` to the parser of the command line."""
    parser = commands.add_parser(
        "tune", help="measure every backend here; the fastest comes first from then on"
    )
    parser.add_argument(
        "--device", help="cpu, cuda or cuda:INDEX; by default a GPU if there is one"
    )
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="to measure for (default: %(default)s)"
    )
    parser.add_argument("--forget", action="store_true", help="forget what was measured here")
    add_json(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Check every family, time those that are right, keep the order and say it."""
    from usp.backends import forget_order, tune

    device = _device(arguments.device)
    if arguments.forget:
        forget_order(device)
        said = f"what was measured on {device} is forgotten"
        present(arguments, {"device": device, "forgotten": True}, lambda: said)
        return Exit.RIGHT
    check_seconds(arguments.seconds)
    try:
        found = tune(device, arguments.seconds)
    except RuntimeError as error:
        raise UserError(str(error)) from error
    times = dict(zip(found.row.order, found.row.times, strict=True))
    told = {"cases": found.cases, "times": times, "left_out": found.left_out, "kept": found.kept}
    present(arguments, {"device": device, **told}, lambda: _text(device, found))
    return Exit.RIGHT


def _text(device: Any, found: Tuned) -> str:
    row = found.row
    parts = [
        f"{device}: attention with its backward, {found.cases} cases, time over the fastest's",
        table(zip(row.order, (f"{ratio:.2f}" for ratio in row.times), strict=True)),
    ]
    if found.left_out:
        parts.append("not measured\n" + table(found.left_out.items()))
    return "\n\n".join([*parts, found.kept])


def _device(name: str | None) -> Any:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device: {error}") from error
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.device(
            "cuda", torch.cuda.current_device() if device.index is None else device.index
        )
    if device.type != "cpu":
        raise UserError(
            f"--device {name}: there is none here, or usp does not measure such devices"
        )
    return device
