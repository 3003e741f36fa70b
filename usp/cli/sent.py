"""Bytes that leave each rank in one layer, by formula: as numbers and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from usp.cli.console import table
from usp.planning.cost import Place, Shape, bias_held, bytes_sent

Sent = dict[str, Any]


def sent_of(shape: Shape, places: Sequence[Place]) -> list[Sent]:
    """Of each rank, by pass and part; with what it holds of a bias, if there is one."""
    found = []
    for rank, place in enumerate(places):
        there, back = bytes_sent(shape, place), bytes_sent(shape, place, backward=True)
        one: Sent = {"rank": rank, "ring_rank": place.ring_rank, "ulysses_rank": place.ulysses_rank}
        one |= {"forward": vars(there), "backward": vars(back), "total": there.total + back.total}
        if shape.bias is not None:
            one["bias_held"], one["bias_gradient_held"] = bias_held(shape, place)
        found.append(one)
    return found


def sent_text(shape: Shape, sent: Sequence[Sent], every: bool, how: str) -> str:
    """Of the busiest rank, or of all.

    Args:
        every: Whether of all.
        how: What else there is to say of the attention.
    """
    which = "every rank" if every else "the busiest rank"
    shown = sent if every else [max(sent, key=lambda one: one["total"])]
    first = ["", "forward", "", "backward", "", ""]
    second = ["rank", "heads", "blocks", "heads", "blocks", "gradients"]
    if shape.bias is not None:
        first, second = [*first, "bias", ""], [*second, "there", "back"]
    rows: list[Sequence[object]] = [[*first, ""], [*second, "both"]]
    for one in shown:
        there, back = one["forward"], one["backward"]
        line = [one["rank"], there["exchange"], there["blocks"]]
        line += [back["exchange"], back["blocks"], back["gradients"]]
        line += [] if shape.bias is None else [there["bias"], back["bias"]]
        rows.append([*line, one["total"]])
    said = (
        f"bytes sent in one layer, {which}: batch {shape.batch}, {shape.num_heads} heads, "
        f"{shape.num_kv_heads} key/value heads of {shape.head_dim}, {how}\n{table(rows)}"
    )
    if shape.bias is None:
        return said
    names = "rank", "bias_held", "bias_gradient_held"
    held = [tuple(one[name] for name in names) for one in sent]
    lines = held if every else [max(held, key=lambda line: line[1:])]
    held_rows = table([("rank", "bias", "gradient"), *lines])
    return f"{said}\n\nbytes of the bias held meanwhile, {which}\n{held_rows}"
