"""How many tokens each rank holds of a whole sequence, and which.

A row of a layout's table is cut into ``ulysses_degree`` contiguous pieces for the ranks of that
mesh row; the head exchange joins them back in order. Lengths that do not divide are cut unevenly,
never padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from usp.planning.dealt import Dealt
from usp.planning.kinds import integer
from usp.planning.layout import (
    Held,
    Layout,
    Layouts,
    Replicated,
    both,
    check_held,
    check_layout,
    rows,
)
from usp.planning.positions import Positions

Lengths = int | Sequence[int] | str | None  # a str is "infer", the same as None


def names_lengths(seq_len: Lengths, layout: Layouts) -> bool:
    """Whether ``seq_len``, right or wrong, or the layouts name the lengths of the whole."""
    pair = layout if isinstance(layout, tuple) else (layout,)
    return not _inferred(seq_len) or not any(isinstance(one, str) for one in pair)


def _inferred(seq_len: Lengths) -> bool:
    return seq_len is None or (isinstance(seq_len, str) and seq_len == "infer")


def named_lengths(seq_len: Lengths, layout: Layouts) -> tuple[int, int] | None:
    """Queries and keys of the whole sequence as far as ``seq_len`` or the layouts name them.

    A side that lies on every rank names its own: one number is then that of the other.

    Raises:
        TypeError: ``seq_len`` is no integer, no pair of integers, not "infer" and not None.
        ValueError: it has not two entries, or one is below 0.
    """
    if _inferred(seq_len):
        of_queries, of_keys = both(layout)
        if isinstance(of_queries, str) or isinstance(of_keys, str):
            return None
        return of_queries.seq_len, of_keys.seq_len
    if not isinstance(seq_len, (tuple, list)):
        whole = integer("seq_len", seq_len, least=0)
        pair = layout if isinstance(layout, tuple) else (layout, layout)
        queries, keys = (x.seq_len if isinstance(x, Replicated) else whole for x in pair)
        return queries, keys
    if len(seq_len) != 2:
        raise ValueError(f"seq_len must be a number or (query, key) lengths, got {seq_len}")
    queries, keys = (integer("seq_len", length, least=0) for length in seq_len)
    return queries, keys


def shares(layout: Layout, seq_len: int, ring_degree: int, ulysses_degree: int) -> tuple[int, ...]:
    """Tokens that each rank of a mesh holds of a whole sequence, in the order of the ranks."""
    return tuple(chain(*row_pieces(layout, seq_len, ring_degree, ulysses_degree)))


def summed_length(name: str, held: Sequence[int], layout: Layout, degrees: tuple[int, int]) -> int:
    """The whole length of which each rank holds some, where all hold their share.

    Args:
        name: Of what they hold.
        held: Tokens of each rank of the mesh.
        degrees: Of the ring and of Ulysses.

    Raises:
        ValueError: a rank holds another share; the same on every rank that was told ``held``.
    """
    if isinstance(layout, Replicated):
        return layout.seq_len
    whole = sum(held)
    for rank, (mine, share) in enumerate(zip(held, shares(layout, whole, *degrees), strict=True)):
        if mine != share:
            raise ValueError(
                f"the ranks of the mesh hold {tuple(held)} tokens of {name}, {whole} in all, but "
                f"layout {layout} gives rank {rank} {share} of them and not {mine}: cut with "
                "usp.shard_sequence, the whole sequence being the same on all ranks"
            )
    return whole


def pieces(length: int, degree: int) -> tuple[int, ...]:
    """Sizes of ``degree`` pieces of ``length`` items; the first ``length % degree`` are longer."""
    return tuple((length + degree - 1 - i) // degree for i in range(degree))


def tile_bounds(tokens: int, tiles: int) -> tuple[tuple[int, int], ...]:
    """Start and length of each tile, as even as they come: at most one a token, so that none is
    empty, but that no tokens are one tile."""
    lengths = pieces(tokens, min(tiles, max(tokens, 1)))
    return tuple(zip(accumulate(lengths[:-1], initial=0), lengths, strict=True))


def row_lengths(layout: Layout, seq_len: int, ring_degree: int) -> tuple[int, ...]:
    """Number of tokens of each ring rank's row."""
    # without a table, in which torch.compile would have to look
    if check_layout(layout) == "contiguous":
        return pieces(seq_len, ring_degree)
    if ring_degree == 1 and isinstance(layout, str):
        return (seq_len,)
    return tuple(len(row) for row in rows(layout, seq_len, ring_degree))


def row_pieces(
    layout: Layout, seq_len: int, ring_degree: int, ulysses_degree: int
) -> tuple[tuple[int, ...], ...]:
    """Tokens of each rank of each mesh row, which hold consecutive pieces of a row of the table.

    Raises:
        ValueError: the layout was made for other lengths or meshes.
    """
    if isinstance(layout, Replicated):
        if layout.seq_len != seq_len:
            raise ValueError(
                f"every rank holds all {layout.seq_len} tokens of the side that is replicated, but "
                f"seq_len says {seq_len}"
            )
        return ((seq_len,) * ulysses_degree,) * ring_degree
    if not isinstance(layout, Held | Dealt):
        lengths = row_lengths(layout, seq_len, ring_degree)
        return tuple(pieces(length, ulysses_degree) for length in lengths)
    check_held(layout, seq_len)
    counts = layout.counts
    if len(counts) != ring_degree * ulysses_degree:
        raise ValueError(
            f"layout {type(layout).__name__} counts the tokens of {len(counts)} ranks, but the "
            f"mesh has {ring_degree * ulysses_degree} (ring {ring_degree} x ulysses "
            f"{ulysses_degree}): "
            "give a count for each of them"
        )
    return tuple(counts[r * ulysses_degree : (r + 1) * ulysses_degree] for r in range(ring_degree))


def local_row(
    layout: Layout, seq_len: int, degrees: tuple[int, int], place: tuple[int, int]
) -> Positions:
    """Global positions of the rank at ``place = (ring_rank, ulysses_rank)``.

    Args:
        degrees: Of the ring and of Ulysses.
    """
    if isinstance(layout, Dealt):  # to single ranks, and not to rows of a mesh
        return rows(layout, seq_len, degrees[0] * degrees[1])[place[0] * degrees[1] + place[1]]
    row = rows(layout, seq_len, degrees[0])[place[0]]
    if isinstance(layout, Replicated):
        return row
    ends = list(accumulate(row_pieces(layout, seq_len, *degrees)[place[0]], initial=0))
    return row.cut(*ends[place[1] :][:2])


def local_positions(
    layout: Layout, seq_len: int, ring_degree: int, ulysses_degree: int, rank: tuple[int, int]
) -> Tensor:
    """The same as a tensor, (n,) int64 sorted."""
    return local_row(layout, seq_len, (ring_degree, ulysses_degree), rank).tensor


def owners(
    layout: Layout, seq_len: int, degrees: tuple[int, int], positions: Tensor
) -> tuple[Tensor, Tensor]:
    """The rank of the mesh that holds each of a few positions, and their indices there.

    Args:
        layout, seq_len: The whole sequence.
        degrees: Of the ring and of Ulysses.
        positions: (n,) int64 on CPU, ascending, all in the sequence.

    Returns:
        (n,) int64 each.
    """
    ring_degree, ulysses_degree = degrees
    owner, index = torch.zeros_like(positions), torch.zeros_like(positions)
    cuts = row_pieces(layout, seq_len, ring_degree, ulysses_degree)
    table = rows(layout, seq_len, ring_degree) if len(positions) else ()
    for r, row in enumerate(table):
        below, up_to = (row.count_below(p) for p in (positions, positions + 1))
        here = up_to > below
        ends = torch.tensor(cuts[r], device=positions.device).cumsum(0)
        in_row = below[here].long()
        u = torch.searchsorted(ends, in_row, right=True)
        owner[here] = r * ulysses_degree + u
        index[here] = in_row - (ends - torch.tensor(cuts[r], device=positions.device))[u]
    return owner, index
