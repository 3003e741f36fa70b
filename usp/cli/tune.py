"""``usp tune``: measure every backend on this machine, and let the fastest come first."""

from __future__ import annotations

import argparse
from typing import Any

from usp.cli.console import UserError, table


def add_arguments(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "tune", help="measure every backend here; the fastest comes first from then on"
    )
    parser.add_argument(
        "--device", help="cpu, cuda or cuda:INDEX; by default a GPU if there is one"
    )
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="to measure for (default: %(default)s)"
    )
    parser.add_argument("--forget", action="store_true", help="forget what was measured here")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Check every family, time those that are right, keep the order and say it."""
    from usp.backends import forget_order, tune

    device = _device(arguments.device)
    if arguments.forget:
        forget_order(device)
        print(f"what was measured on {device} is forgotten")
        return 0
    if not arguments.seconds > 0:
        raise UserError(f"--seconds must be positive, got {arguments.seconds}")
    try:
        found = tune(device, arguments.seconds)
    except RuntimeError as error:
        raise UserError(str(error)) from error
    row = found.row
    print(f"{device}: attention with its backward, {found.cases} cases, time over the fastest's\n")
    print(table(zip(row.order, (f"{ratio:.2f}" for ratio in row.times), strict=True)))
    if found.left_out:
        print("\nnot measured")
        print(table(found.left_out.items()))
    print(f"\n{found.kept}")
    return 0


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
