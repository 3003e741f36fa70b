"""``usp plan``: what each ring rank computes, in which order, and what it sends."""

from __future__ import annotations

import argparse
from itertools import product, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from usp.cli.console import UserError, table
from usp.cli.expression import parse_mask
from usp.cli.picture import draw, in_signs, save
from usp.planning.cost import Bias, Place, Shape, bias_held, bytes_sent
from usp.planning.layout import DocumentZigzag, Layout
from usp.planning.masks.mask import Mask, shifted
from usp.planning.masks.options import make_mask
from usp.planning.plan import Load, Plan, make_plan
from usp.planning.route import TRANSPORTS, Ring, Route
from usp.planning.samples import masks_of

COLUMNS, LINES = 64, 64  # of a picture in a terminal

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def bound(text: str) -> int | None:
    """A side of a window: a number of keys, or "none"."""
    return None if text.lower() == "none" else int(text)


def integers(text: str) -> tuple[int, ...]:
    """Comma-separated integers."""
    return tuple(int(part) for part in text.split(","))


def dims(text: str) -> str:
    """Letters out of "bhq", or "none"."""
    letters = "" if text.lower() == "none" else text
    if set(letters) - set("bhq"):
        raise argparse.ArgumentTypeError(f"takes letters out of bhq, or none, not {text!r}")
    return letters


def add_arguments(commands: Commands) -> argparse.ArgumentParser:
    """Describe ``usp plan`` to the parser of the command line."""
    parser = commands.add_parser("plan", help="what each ring rank computes, and what it sends")
    parser.add_argument("--seq-len", type=int, required=True, metavar="N", help="all tokens")
    parser.add_argument("--key-len", type=int, metavar="N", help="all keys; default: --seq-len")
    parser.add_argument("--ring", type=int, default=1, metavar="R", help="ring degree")
    parser.add_argument("--ulysses", type=int, default=1, metavar="U", help="Ulysses degree")
    parser.add_argument(
        "--layout",
        default="contiguous",
        help="contiguous, zigzag, striped or document-zigzag (which needs --cu-seqlens)",
    )
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
    parser.add_argument("--png", type=Path, metavar="FILE", help="the picture of --show as a PNG")
    wire = parser.add_argument_group("for the bytes on the wire")
    wire.add_argument("--batch", type=int, default=1, metavar="B", help="default: %(default)s")
    wire.add_argument("--transport", default="auto", choices=TRANSPORTS)
    wire.add_argument("--heads", type=int, default=32, metavar="H", help="default: %(default)s")
    wire.add_argument("--kv-heads", type=int, metavar="G", help="default: --heads")
    wire.add_argument("--head-dim", type=int, default=128, metavar="D", help="default: %(default)s")
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
    return parser


def chosen_layout(arguments: argparse.Namespace) -> Layout:
    """The layout that the arguments name."""
    if arguments.layout != "document-zigzag":
        return str(arguments.layout)
    if arguments.cu_seqlens is None:
        raise ValueError("--layout document-zigzag cuts documents: give them as --cu-seqlens 0,...")
    return DocumentZigzag(arguments.cu_seqlens)


def check(arguments: argparse.Namespace) -> None:
    """Refuse what the planner is never asked otherwise: its callers have real meshes."""
    least_of = {"seq_len": 0, "key_len": 0}
    for name in ("seq_len", "key_len", "ring", "ulysses", "batch", "heads", "kv_heads", "head_dim"):
        value, least = getattr(arguments, name), least_of.get(name, 1)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
    if arguments.kv_heads and arguments.heads % arguments.kv_heads:
        raise ValueError(
            f"--heads {arguments.heads} is not a multiple of --kv-heads {arguments.kv_heads}"
        )
    if arguments.cu_seqlens and arguments.cu_seqlens[-1] != arguments.seq_len:
        raise ValueError(
            f"--cu-seqlens ends at {arguments.cu_seqlens[-1]}, but --seq-len is {arguments.seq_len}"
        )


def key_len(arguments: argparse.Namespace) -> int:
    return int(arguments.seq_len if arguments.key_len is None else arguments.key_len)


def chosen_mask(arguments: argparse.Namespace) -> Mask:
    """The mask that the arguments describe."""
    mask = make_mask(
        causal=arguments.causal,
        window_size=tuple(arguments.window),
        cu_seqlens=arguments.cu_seqlens,
        prefix_len=arguments.prefix_len,
    )
    if arguments.mask is not None:
        mask = mask & parse_mask(arguments.mask)
    mask = shifted(mask, arguments.query_offset)
    mask.refuse_lengths(arguments.seq_len, key_len(arguments))
    return mask


def make_plans(arguments: argparse.Namespace) -> list[Plan]:
    """The plan of every ring rank."""
    mask, layout = chosen_mask(arguments), chosen_layout(arguments)
    lengths = arguments.seq_len, key_len(arguments)
    return [
        make_plan(masks_of(mask), layout, lengths, arguments.ring, rank, arguments.transport)
        for rank in range(arguments.ring)
    ]


def balance(plans: list[Plan]) -> str:
    """One line for each ring rank: its tokens, its work, and its work against the mean."""
    mean = sum(plan.pairs for plan in plans) / len(plans)
    rows: list[tuple[object, ...]] = [
        ("ring rank", "tokens", "steps", "to compute", "visible pairs", "of the mean")
    ]
    for plan in plans:
        share = f"{plan.pairs / mean:.3f}" if mean else "-"
        busy = sum(step.pairs > 0 for step in plan.steps)
        rows.append((plan.ring_rank, len(plan.queries), len(plan.steps), busy, plan.pairs, share))
    return table(rows)


def steps(plan: Plan) -> str:
    """One line for each step of one ring rank."""
    rows: list[tuple[object, ...]] = [
        ("step", "owner", "comes by", "queries", "keys", "sees", "visible pairs")
    ]
    ways = ["", *(ways_of(plan.route) if plan.route is not None else ())]
    for index, (step, way) in enumerate(zip(plan.steps, ways, strict=True)):
        (load,) = step.loads
        seen = sees(load)
        rows.append((index, step.owner, way, len(plan.queries), len(load.rows), seen, step.pairs))
    return f"ring rank {plan.ring_rank}\n{table(rows)}"


def ways_of(route: Route) -> list[str]:
    """How each block that comes has come, in the order of ``route.arrivals``."""
    if not isinstance(route, Ring):
        return ["allgather" if route.gathers else "direct"] * len(route.arrivals)
    each = ([(way.by, hop) for hop in range(1, len(way.hops) + 1)] for way in route.directions)
    ways = (way for hops in zip_longest(*each) for way in hops if way is not None)
    return [f"hop {hop} from the rank {'before' if by == 1 else 'behind'}" for by, hop in ways]


def sees(load: Load) -> str:
    """What a kernel has to do: nothing, a rectangle, or so many intervals for each query."""
    if not load.visits:
        return "none"
    if load.visits[0].span is None:
        return "all"
    return "span" if len(load.visits) == 1 else f"{len(load.visits)} spans"


def wire(arguments: argparse.Namespace) -> str:
    """The bytes that leave each rank in one layer, by formula; the busiest rank, or all."""
    heads, dim = arguments.heads, arguments.head_dim
    kv_heads = heads if arguments.kv_heads is None else arguments.kv_heads
    dtype = getattr(torch, arguments.dtype)
    lengths = arguments.seq_len, key_len(arguments)
    bias = None
    if arguments.bias is not None:
        bias = Bias(arguments.bias, dtype, arguments.bias_gradient)
    shape = Shape(arguments.batch, *lengths, heads, kv_heads, dim, dim, dtype, bias=bias)
    mask, layout = chosen_mask(arguments), chosen_layout(arguments)
    sent: list[tuple[int, ...]] = []
    held: list[tuple[int, ...]] = []
    for ranks in product(range(arguments.ring), range(arguments.ulysses)):
        degrees = arguments.ring, arguments.ulysses
        place = Place(*degrees, *ranks, layout, mask, arguments.transport)
        there, back = bytes_sent(shape, place), bytes_sent(shape, place, backward=True)
        parts = [there.exchange, there.blocks, back.exchange, back.blocks, back.gradients]
        if bias is not None:
            parts += [there.bias, back.bias]
        held.append((len(sent), *bias_held(shape, place)))
        sent.append((len(sent), *parts, there.total + back.total))
    which = "every rank" if arguments.show else "the busiest rank"
    said = (
        f"bytes sent in one layer, {which}: batch {arguments.batch}, {heads} heads, {kv_heads} "
        f"key/value heads of {dim}, {arguments.dtype}, {arguments.transport} transport\n"
        f"{_sent_table(sent, arguments)}"
    )
    if bias is None:
        return said
    shown = held if arguments.show else [max(held, key=lambda line: line[1:])]
    rows = [("rank", "bias", "gradient"), *shown]
    return f"{said}\n\nbytes of the bias held meanwhile, {which}\n{table(rows)}"


def _sent_table(sent: list[tuple[int, ...]], arguments: argparse.Namespace) -> str:
    shown = sent if arguments.show else [max(sent, key=lambda line: line[-1])]
    first = ["", "forward", "", "backward", "", ""]
    second = ["rank", "heads", "blocks", "heads", "blocks", "gradients"]
    if arguments.bias is not None:
        first += ["bias", ""]
        second += ["there", "back"]
    return table([[*first, ""], [*second, "both"], *shown])


def report(arguments: argparse.Namespace) -> str:
    """Everything ``usp plan`` prints.

    Raises:
        ValueError: arguments that no plan can be made for; names the values.
    """
    check(arguments)
    plans = make_plans(arguments)
    parts = [
        f"{arguments.seq_len} tokens, ring {arguments.ring} x ulysses {arguments.ulysses} = "
        f"{arguments.ring * arguments.ulysses} ranks, layout {arguments.layout}",
        balance(plans),
    ]
    if arguments.show:
        parts += [steps(plan) for plan in plans]
        picture = draw(plans, COLUMNS, LINES)
        if picture is not None:
            parts.append(in_signs(picture))
    parts.append(wire(arguments))
    return "\n\n".join(parts)


def save_picture(arguments: argparse.Namespace) -> None:
    """Write the picture of ``--png``.

    Raises:
        UserError: it cannot be drawn or written; says why.
    """
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
        said = report(arguments)
        if arguments.png is not None:
            save_picture(arguments)
        print(said)
    except (ValueError, NotImplementedError) as error:
        raise UserError(str(error)) from error
    return 0
