"""Which token is where: a layout is a table of global positions.

Row ``r`` of the table holds the sorted global positions of ring rank ``r`` (``positions.py``). How
a row is cut for the ranks of its mesh row stands in ``shares.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from usp.planning.dealt import Dealt, Run
from usp.planning.kinds import integer
from usp.planning.masks.bounds import check_cu_seqlens
from usp.planning.positions import Positions

Runs = list[tuple[Tensor, Tensor]]
# Said everywhere, because a user may have set another default device.
_HOST = torch.device("cpu")


def chunk(length: Tensor, parts: int, i: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of the i-th of ``parts`` chunks; the first ``length % parts`` are one longer."""
    small, longer = length // parts, length % parts
    start = i * small + torch.minimum(i, longer)
    return start, start + small + (i < longer)


def contiguous(length: Tensor, ring_degree: int, r: Tensor) -> Runs:
    """The r-th of R chunks."""
    return [chunk(length, ring_degree, r)]


def zigzag(length: Tensor, ring_degree: int, r: Tensor) -> Runs:
    """Chunks r and 2R-1-r of 2R, the same causal work for every r (also: dual chunk swap)."""
    last = 2 * ring_degree - 1
    return [chunk(length, last + 1, r), chunk(length, last + 1, last - r)]


def striped(length: Tensor, ring_degree: int, r: Tensor) -> Runs:
    """Tokens r, r+R, r+2R, ..."""
    return [(r, torch.maximum(length, r))]


class Rule(NamedTuple):
    """How a layout deals out a sequence.

    Attributes:
        runs: Of a length, the ring's degree and a rank, the bounds of that rank's runs.
        strided: Whether neighbours in a run are a ring's degree apart, and not one.
    """

    runs: Callable[[Tensor, int, Tensor], Runs]
    strided: bool = False


LAYOUTS = {
    "contiguous": Rule(contiguous),
    "zigzag": Rule(zigzag),
    "striped": Rule(striped, strided=True),
}


@dataclass(frozen=True)
class DocumentZigzag:
    """Zigzag inside each packed document, the only layout that balances packed causal work.

    Args:
        cu_seqlens: Document boundaries ``(0, ..., total)``; a CPU tensor is turned into a tuple.
    """

    cu_seqlens: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "cu_seqlens", check_cu_seqlens(self.cu_seqlens))

    @property
    def seq_len(self) -> int:
        """Tokens of the whole sequence."""
        return self.cu_seqlens[-1]


@dataclass(frozen=True)
class Held:
    """Tokens as they are: rank 0 of the mesh holds the first ``counts[0]``, rank 1 the next, ...

    For what nobody cut by a rule: a text that one rank holds whole, pruned tokens, caches, and
    streams that were cut each for itself and joined on every rank, whose order is then that in
    which they lie: text of rank 0, image of rank 0, text of rank 1, ... ``usp.held`` asks the
    ranks for the counts.

    Args:
        counts: Tokens of each rank of the mesh, in the order of ``mesh.rank``; 0 is allowed.

    Raises:
        TypeError: a count is no integer.
        ValueError: one is below 0, or there are none.
    """

    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        counts = tuple(integer("a count of Held", count, least=0) for count in self.counts)
        if not counts:
            raise ValueError("Held needs the tokens of each rank of the mesh, got no counts")
        object.__setattr__(self, "counts", counts)

    @property
    def seq_len(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.counts)


@dataclass(frozen=True)
class Replicated:
    """All tokens on every rank: no layout to cut by, but where one side of an attention may lie.

    Attributes:
        seq_len: Tokens of the whole sequence.
    """

    seq_len: int


Layout = str | DocumentZigzag | Held | Replicated | Dealt
# One for queries and keys, or one for each.
Layouts = Layout | tuple[Layout, Layout]


def both(layout: Layouts) -> tuple[Layout, Layout]:
    """The layouts of queries and of keys.

    Raises:
        ValueError: one is unknown, or they are no pair.
    """
    pair = layout if isinstance(layout, tuple) else (layout, layout)
    if len(pair) != 2:
        raise ValueError(f"layout must be one, or a pair (of queries, of keys), got {layout!r}")
    return check_layout(pair[0]), check_layout(pair[1])


def replicated(layouts: tuple[Layout, Layout]) -> bool:
    """Whether one of the two sides is on every rank."""
    return any(isinstance(layout, Replicated) for layout in layouts)


def told(layout: Layout) -> tuple[str, tuple[int, ...] | None]:
    """A layout as a name and numbers; None for a rule of LAYOUTS."""
    if isinstance(layout, DocumentZigzag):
        return "documents", layout.cu_seqlens
    if isinstance(layout, Held):
        return "held", layout.counts
    if isinstance(layout, Replicated):
        return "replicated", (layout.seq_len,)
    if isinstance(layout, Dealt):
        return "dealt", (layout.ranks, layout.seq_len, *chain(*layout.runs))
    return layout, None


def from_told(name: str, numbers: Sequence[int] | None) -> Layout:
    """The way back."""
    if numbers is None:
        return name
    if name == "replicated":
        return Replicated(*numbers)
    if name == "dealt":
        runs = tuple(Run(*numbers[i : i + 3]) for i in range(2, len(numbers), 3))
        return Dealt(numbers[0], numbers[1], runs)
    return (DocumentZigzag if name == "documents" else Held)(tuple(numbers))


def check_layout(layout: Layout) -> Layout:
    """``layout`` itself if it is known.

    Raises:
        ValueError: names the layout and those there are.
    """
    if isinstance(layout, DocumentZigzag | Held | Replicated | Dealt):
        return layout
    if isinstance(layout, str) and layout in LAYOUTS:
        return layout
    raise ValueError(
        f"unknown layout {layout!r}: use one of {', '.join(LAYOUTS)}, DocumentZigzag(cu_seqlens) "
        "or Held(counts)"
    )


@lru_cache(maxsize=32)
def rows(layout: Layout, seq_len: int, ring_degree: int) -> tuple[Positions, ...]:
    """The table of ``layout``: one row for each ring rank.

    Raises:
        ValueError: the layout is unknown, or made for another number of tokens or ranks.
    """
    check_layout(layout)
    if isinstance(layout, Replicated):
        return rows("contiguous", seq_len, 1) * ring_degree
    if isinstance(layout, Held):
        return _held_rows(layout, seq_len, ring_degree)
    if isinstance(layout, Dealt):
        return _dealt_rows(layout, seq_len, ring_degree)
    if isinstance(layout, DocumentZigzag):
        return _document_rows(layout, seq_len, ring_degree)
    rule = LAYOUTS[layout]
    bounds = torch.tensor([0, seq_len], device=_HOST)
    stride = ring_degree if rule.strided else 1
    ranks = torch.arange(ring_degree, device=_HOST)[:, None]
    return _table(bounds, rule.runs(bounds[1:], ring_degree, ranks), stride)


def _document_rows(layout: DocumentZigzag, seq_len: int, ring_degree: int) -> tuple[Positions, ...]:
    if seq_len != layout.cu_seqlens[-1]:
        raise ValueError(
            f"layout DocumentZigzag holds {layout.cu_seqlens[-1]} tokens (cu_seqlens[-1]), "
            f"but the sequence has {seq_len}"
        )
    bounds = torch.tensor(layout.cu_seqlens, device=_HOST)
    document = torch.arange(len(bounds) - 1, device=_HOST)
    ranks = torch.arange(ring_degree, device=_HOST)[:, None]
    # The first chunks of a document are the longer ones: rotate which rank gets them.
    return _table(bounds, zigzag(bounds.diff(), ring_degree, (ranks + document) % ring_degree), 1)


def check_held(layout: Held | Dealt, seq_len: int) -> None:
    """Refuse what is of another whole."""
    if seq_len != layout.seq_len:
        what = " (the sum of its counts)" if isinstance(layout, Held) else ""
        raise ValueError(
            f"layout {type(layout).__name__} holds {layout.seq_len} tokens{what}, but the sequence "
            f"has {seq_len}"
        )


def _dealt_rows(layout: Dealt, seq_len: int, ring_degree: int) -> tuple[Positions, ...]:
    """Each run is a segment, in which all ranks but one hold nothing."""
    check_held(layout, seq_len)
    if layout.ranks != ring_degree:
        raise NotImplementedError(
            f"tokens of a cache are dealt to {layout.ranks} ranks, which are no {ring_degree} rows "
            "of a mesh: with ulysses_degree above 1, where heads change hands, a cache takes "
            "queries='replicated' alone (usp.decode_attention)"
        )
    runs = layout.runs or (Run(0, 0, 0),)
    owner, start, stop = torch.tensor(runs, device=_HOST).T
    return tuple(
        Positions(start, torch.where(owner == r, stop, start), 1) for r in range(ring_degree)
    )


def _held_rows(layout: Held, seq_len: int, ring_degree: int) -> tuple[Positions, ...]:
    check_held(layout, seq_len)
    degree, rest = divmod(len(layout.counts), ring_degree)
    if rest:
        raise ValueError(
            f"layout Held counts the tokens of {len(layout.counts)} ranks, which are no "
            f"{ring_degree} rows of a mesh: give a count for each rank"
        )
    counts = torch.tensor(layout.counts, device=_HOST).view(ring_degree, degree).sum(1, True)
    stops = counts.cumsum(0)
    return _table(torch.tensor([0, seq_len], device=_HOST), [(stops - counts, stops)], 1)


def _table(bounds: Tensor, runs: Runs, stride: int) -> tuple[Positions, ...]:
    """Of runs that are (ranks, segments) each, counted from where their segment begins."""
    starts, stops = zip(*runs, strict=True)
    start, stop = (torch.stack(end, 2) + bounds[:-1, None] for end in (starts, stops))
    ends = zip(start.flatten(1), stop.flatten(1), strict=True)
    return tuple(Positions(*each, stride) for each in ends)
