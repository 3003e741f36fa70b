"""The attention that the arguments of ``usp plan`` describe, and what its ranks do."""

from __future__ import annotations

import argparse
from itertools import product

import torch

from usp.cli.console import UserError
from usp.cli.expression import parse_mask
from usp.cli.layouts import parse_layout
from usp.cli.work import Work, of_grid, of_keys_that_come
from usp.planning.choose.model import MODELS
from usp.planning.cost import Bias, Place, Shape, what_moves
from usp.planning.grid import make_grid
from usp.planning.layout import Layout, Replicated, replicated
from usp.planning.masks.mask import Mask, shifted
from usp.planning.masks.options import make_mask
from usp.planning.plan import Plan, make_local_plan, make_plan
from usp.planning.query_ring import make_query_ring
from usp.planning.route import of_keys
from usp.planning.samples import masks_of


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
        grids = (make_query_ring(*what, ring, rank, "direct") for rank in range(ring))
        return [of_grid(grid) for grid in grids], f"queries move to the keys they see{back}"
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
