"""``usp plan``: what each ring rank computes and sends, or which degrees to choose."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from usp.cli import calibrate, choose
from usp.cli.console import UserError, present, table
from usp.cli.described import (
    asked_mask,
    check,
    chosen_layouts,
    chosen_mask,
    chosen_shape,
    key_len,
    keys_come,
    make_plans,
    make_works,
    places,
)
from usp.cli.layouts import FORMS, integers
from usp.cli.nodes import between_nodes
from usp.cli.picture import draw, in_signs, save
from usp.cli.sent import sent_of, sent_text
from usp.cli.work import balance
from usp.planning.layout import replicated, rows
from usp.planning.positions import Positions
from usp.planning.route import TRANSPORTS

COLUMNS, LINES = 64, 64  # of a picture in a terminal

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def bound(text: str) -> int | None:
    """A side of a window: a number of keys, or "none"."""
    return None if text.lower() == "none" else int(text)


def dims(text: str) -> str:
    """Letters out of "bhq", or "none"."""
    letters = "" if text.lower() == "none" else text
    if set(letters) - set("bhq"):
        raise argparse.ArgumentTypeError(f"takes letters out of bhq, or none, not {text!r}")
    return letters


def add_arguments(commands: Commands) -> argparse.ArgumentParser:
    """Describe ``usp plan`` to the parser of the command line."""
    parser = commands.add_parser(
        "plan",
        help="which degrees to choose for a model and a cluster; or, without --model, what each "
        "ring rank computes and sends",
    )
    parser.add_argument("--seq-len", type=int, metavar="N", help="all tokens")
    parser.add_argument("--key-len", type=int, metavar="N", help="all keys; default: --seq-len")
    parser.add_argument("--ring", type=int, default=1, metavar="R", help="ring degree")
    parser.add_argument(
        "--ring-outer", type=int, default=1, metavar="N", help="nodes of a double ring"
    )
    parser.add_argument("--ulysses", type=int, default=1, metavar="U", help="Ulysses degree")
    parser.add_argument(
        "--layout",
        default="contiguous",
        help=f"{FORMS}; document-zigzag needs --cu-seqlens",
    )
    parser.add_argument("--key-layout", metavar="LAYOUT", help="of keys that lie differently")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument(
        "--window",
        nargs=2,
        type=bound,
        default=(None, None),
        metavar=("LEFT", "RIGHT"),
        help="visible keys on each side, or none",
    )
    parser.add_argument("--cu-seqlens", type=integers, metavar="0,...,N", help="document bounds")
    parser.add_argument("--prefix-len", type=int, metavar="N", help="keys that causal leaves open")
    parser.add_argument(
        "--mask",
        metavar="EXPR",
        help="as masks print themselves: 'causal() & (window(512, 512) | first_keys(4))'",
    )
    parser.add_argument(
        "--query-offset", type=int, default=0, metavar="N", help="keys before the first query"
    )
    parser.add_argument(
        "--show", action="store_true", help="every step of every ring rank, and what it sees"
    )
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="the picture of --show, or of --simulate, as a PNG"
    )
    wire = parser.add_argument_group("for the bytes on the wire")
    wire.add_argument("--batch", type=int, default=1, metavar="B", help="default: %(default)s")
    wire.add_argument("--transport", default="auto", choices=TRANSPORTS)
    wire.add_argument("--heads", type=int, default=32, metavar="H", help="default: %(default)s")
    wire.add_argument("--kv-heads", type=int, metavar="G", help="default: --heads")
    wire.add_argument("--head-dim", type=int, default=128, metavar="D", help="default: %(default)s")
    wire.add_argument(
        "--latent", type=int, metavar="N", help="numbers of a token that keys are made of (MLA)"
    )
    wire.add_argument(
        "--bias",
        type=dims,
        metavar="DIMS",
        help="an additive bias that differs among samples (b), heads (h), queries (q): letters "
        "out of bhq, or none",
    )
    wire.add_argument("--bias-gradient", action="store_true", help="the bias is learned")
    wire.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("float64", "float32", "bfloat16", "float16"),
        help="default: %(default)s",
    )
    choose.add_arguments(parser)
    return parser


def _runs(positions: Positions) -> list[tuple[int, int, int]]:
    """Of a rank's tokens: first, one past the last, distance."""
    ends = zip(positions.start.flatten().tolist(), positions.stop.flatten().tolist(), strict=True)
    return [(first, stop, positions.stride) for first, stop in ends if first < stop]


def document(arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``report`` tells, for programs.

    Raises:
        ValueError: as ``report``.
    """
    check(arguments)
    (works, how), layouts = make_works(arguments), chosen_layouts(arguments)
    numbers = "seq_len", "ring", "ring_outer", "ulysses", "batch", "heads", "head_dim", "dtype"
    found = {name: getattr(arguments, name) for name in (*numbers, "layout", "transport")}
    queries = [] if replicated(layouts) else rows(layouts[0], arguments.seq_len, arguments.ring)
    return {
        **found,
        "key_len": key_len(arguments),
        "mask": repr(chosen_mask(arguments)),
        "moves": how,
        "positions": [_runs(positions) for positions in queries],
        "steps": [
            [dict(zip(work.steps[0], step, strict=True)) for step in work.steps[1:]]
            for work in works
        ],
        "pairs": [sum(work.pairs) for work in works],
        "sent": sent_of(chosen_shape(arguments), places(arguments)),
    }


def report(arguments: argparse.Namespace) -> str:
    """Everything ``usp plan`` prints.

    Raises:
        ValueError: arguments that no plan can be made for; names the values.
    """
    check(arguments)
    works, how = make_works(arguments)
    keys = f", keys {arguments.key_layout}" if arguments.key_layout else ""
    ranks = "rank" if replicated(chosen_layouts(arguments)) else "ring rank"
    over = f" over {arguments.ring_outer} nodes" if arguments.ring_outer > 1 else ""
    parts = [
        f"{arguments.seq_len} tokens, ring {arguments.ring}{over} x ulysses {arguments.ulysses} = "
        f"{arguments.ring * arguments.ulysses} ranks, layout {arguments.layout}{keys}: {how}",
        balance(works, ranks),
    ]
    if arguments.show:
        parts += [f"{ranks} {rank}\n{table(work.steps)}" for rank, work in enumerate(works)]
        picture = draw(make_plans(arguments), COLUMNS, LINES) if keys_come(arguments) else None
        if picture is not None:
            parts.append(in_signs(picture))
    parts.append(_sent(arguments))
    if arguments.ring_outer > 1 and not replicated(chosen_layouts(arguments)):
        parts.append(between_nodes(chosen_shape(arguments), places(arguments)))
    return "\n\n".join(parts)


def _sent(arguments: argparse.Namespace) -> str:
    shape = chosen_shape(arguments)
    of_latents = f", latents of {arguments.latent}" if arguments.latent else ""
    how = f"{arguments.dtype}, {arguments.transport} transport{of_latents}"
    return sent_text(shape, sent_of(shape, places(arguments)), arguments.show, how)


def save_picture(arguments: argparse.Namespace) -> None:
    """Write the picture of ``--png``.

    Raises:
        UserError: it cannot be drawn or written; says why.
    """
    if not keys_come(arguments):
        raise UserError(
            "--png draws keys that come to queries, and here queries move or are on every rank: "
            "try --transport direct"
        )
    picture = draw(make_plans(arguments), 4 * COLUMNS, 4 * LINES)
    if picture is None:
        raise UserError("--png: there are no queries or no keys to draw")
    title = f"{chosen_mask(arguments)}, {arguments.layout}, {arguments.transport} transport"
    try:
        save(picture, arguments.png, title)
    except OSError as error:
        raise UserError(f"--png: {error}") from error


def run(arguments: argparse.Namespace) -> int:
    """Print the report, or refuse as the planner does."""
    try:
        if arguments.calibrate is not None:
            return calibrate.run(arguments)
        with _one_thread():
            if arguments.model is not None or arguments.sources:
                return choose.run(arguments, asked_mask(arguments))
            found = {} if arguments.json is None else document(arguments)
            said = "" if arguments.json == "-" else report(arguments)
            if arguments.png is not None:
                save_picture(arguments)
        present(arguments, found, lambda: said)
    except (ValueError, NotImplementedError) as error:
        raise UserError(str(error)) from error
    return 0


@contextmanager
def _one_thread() -> Iterator[None]:
    """Plans are thousands of small operations: with more, each waits for threads that others have
    put off the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
