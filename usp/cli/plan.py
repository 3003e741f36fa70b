"""``usp plan``: what each ring rank computes and sends, or which degrees to choose."""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from usp.cli import calibrate, choose
from usp.cli.console import UserError, present, table
from usp.cli.expression import parse_mask
from usp.cli.layouts import FORMS, integers, parse_layout
from usp.cli.nodes import between_nodes
from usp.cli.picture import draw, in_signs, save
from usp.cli.sent import sent_of, sent_text
from usp.cli.work import Work, balance, of_grid, of_keys_that_come, of_queries_that_come
from usp.planning.choose.model import MODELS
from usp.planning.cost import Bias, Place, Shape, what_moves
from usp.planning.grid import make_grid
from usp.planning.layout import Layout, Positions, Replicated, replicated, rows
from usp.planning.masks.mask import Mask, shifted
from usp.planning.masks.options import make_mask
from usp.planning.plan import Plan, make_local_plan, make_plan
from usp.planning.query_ring import make_query_steps
from usp.planning.route import TRANSPORTS, of_keys
from usp.planning.samples import masks_of

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


def chosen_layouts(arguments: argparse.Namespace) -> tuple[Layout, Layout]:
    """The layouts of queries and of keys that the arguments name."""
    names = arguments.layout, arguments.key_layout or arguments.layout
    if arguments.key_layout is None and arguments.layout == "replicated":
        names = "replicated", "contiguous"
    lengths = arguments.seq_len, key_len(arguments)
    queries, keys = (
        parse_layout(name, length, arguments.cu_seqlens)
        for name, length in zip(names, lengths, strict=True)
    )
    if isinstance(queries, Replicated) and isinstance(keys, Replicated):
        raise ValueError("queries and keys are both replicated: nothing is shared")
    return queries, keys


def check(arguments: argparse.Namespace) -> None:
    """Refuse what the planner is never asked otherwise: its callers have real meshes."""
    if arguments.seq_len is None:
        raise UserError("give --seq-len, all tokens; with --model, which degrees to choose for it")
    for name in ("devices", "memory", "only", "simulate"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} needs --model")
    least_of = {"seq_len": 0, "key_len": 0}
    names = "seq_len", "key_len", "ring", "ring_outer", "ulysses", "batch", "heads", "kv_heads"
    for name in (*names, "head_dim", "latent"):
        value, least = getattr(arguments, name), least_of.get(name, 1)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
    if arguments.ring % arguments.ring_outer:
        raise ValueError(
            f"--ring-outer {arguments.ring_outer} does not divide --ring {arguments.ring}"
        )
    nodes, ring = arguments.ring_outer, arguments.ring
    if arguments.transport == "grid" and ring > 1 and not 1 < nodes < ring:
        raise ValueError(
            f"--transport grid needs a ring of two levels: --ring-outer between 1 and --ring "
            f"{ring}, got {nodes}"
        )
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


def asked_mask(arguments: argparse.Namespace) -> Mask | None:
    """The mask of ``--model``: None where that of the model is meant. A causal model's others are
    causal too."""
    model = None if arguments.model is None else MODELS.get(arguments.model)
    others = *arguments.window, arguments.cu_seqlens, arguments.prefix_len, arguments.mask
    is_causal = model is not None and model.causal
    if all(other is None for other in others) and (model is None or is_causal >= arguments.causal):
        return None
    if arguments.seq_len is None:
        return None
    arguments.causal = arguments.causal or is_causal
    return chosen_mask(arguments)


def places(arguments: argparse.Namespace) -> list[Place]:
    """Of every rank of the mesh."""
    mask, layouts = chosen_mask(arguments), chosen_layouts(arguments)
    degrees = arguments.ring, arguments.ulysses
    return [
        Place(*degrees, *ranks, layouts, mask, arguments.transport, arguments.ring_outer)
        for ranks in product(range(arguments.ring), range(arguments.ulysses))
    ]


def make_plans(arguments: argparse.Namespace) -> list[Plan]:
    """The plan of every ring rank where keys come, or of every rank where one side is there."""
    masks, layouts = masks_of(chosen_mask(arguments)), chosen_layouts(arguments)
    lengths, degrees = (arguments.seq_len, key_len(arguments)), (arguments.ring, arguments.ulysses)
    if replicated(layouts):
        return [
            make_local_plan(masks, layouts, lengths, degrees, (p.ring_rank, p.ulysses_rank))
            for p in places(arguments)
        ]
    transport = of_keys(arguments.transport)
    return [
        make_plan(masks, layouts, lengths, arguments.ring, rank, transport, arguments.ring_outer)
        for rank in range(arguments.ring)
    ]


def keys_come(arguments: argparse.Namespace) -> bool:
    """Whether each rank sees all keys of its own queries, which a picture can show."""
    is_here = isinstance(chosen_layouts(arguments)[0], Replicated)
    moves = what_moves(chosen_shape(arguments), places(arguments)[0])
    return not is_here and moves.forward == "keys"


_IN_THE_BACKWARD = {
    "keys": "and in the backward keys to the queries",
    "queries": "and in the backward queries to the keys",
    "both": "and in the backward queries in a node and keys between nodes",
}


def make_works(arguments: argparse.Namespace) -> tuple[list[Work], str]:
    """What every rank does, and how it comes to it."""
    place, shape = places(arguments)[0], chosen_shape(arguments)
    layouts, lengths = chosen_layouts(arguments), (shape.query_len, shape.key_len)
    what, ring = (masks_of(chosen_mask(arguments)), layouts, lengths), arguments.ring
    moves = what_moves(shape, place)
    back = "" if moves.backward == moves.forward else f", {_IN_THE_BACKWARD[moves.backward]}"
    if moves.forward == "both":
        grids = (make_grid(*what, ring, rank, arguments.ring_outer) for rank in range(ring))
        return [
            of_grid(grid) for grid in grids
        ], f"queries move in a node, keys between nodes{back}"
    if moves.forward == "queries":
        plans = (make_query_steps(*what, ring, rank, "direct") for rank in range(ring))
        return [
            of_queries_that_come(plan) for plan in plans
        ], f"queries move to the keys they see{back}"
    works = [of_keys_that_come(plan) for plan in make_plans(arguments)]
    if not replicated(layouts):
        return works, f"keys move to the queries that see them{back}"
    if isinstance(layouts[0], Replicated):
        return works, "queries are on every rank, results are merged"
    return works, "keys are on every rank, nothing moves"


def chosen_shape(arguments: argparse.Namespace) -> Shape:
    """The attention that the arguments describe."""
    heads, dim = arguments.heads, arguments.head_dim
    kv_heads = heads if arguments.kv_heads is None else arguments.kv_heads
    dtype, bias = getattr(torch, arguments.dtype), None
    if arguments.bias is not None:
        bias = Bias(arguments.bias, dtype, arguments.bias_gradient)
    lengths = arguments.seq_len, key_len(arguments)
    sizes = arguments.batch, *lengths, heads, kv_heads, dim, dim, dtype
    return Shape(*sizes, bias=bias, latent_width=arguments.latent)


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
