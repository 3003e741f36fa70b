"""What a double ring sends between nodes, beside a plain one over the same ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from usp.cli.console import table
from usp.planning.cost import Place, Shape, bytes_between_nodes


def between_nodes(shape: Shape, places: Sequence[Place]) -> str:
    """Bytes that leave a node in one layer, forward and backward: those of the busiest rank, on
    whose link all wait, and of all ranks."""
    nodes = places[0].ring_outer_degree
    rows: list[tuple[object, ...]] = [("", "busiest rank", "all ranks")]
    for name, outer in ((f"over {nodes} nodes", nodes), ("as a plain ring", 1)):
        sent = [
            sum(
                bytes_between_nodes(shape, replace(p, ring_outer_degree=outer), nodes, way).total
                for way in (False, True)
            )
            for p in places
        ]
        rows.append((name, max(sent), sum(sent)))
    return f"bytes between nodes in one layer\n{table(rows)}"
