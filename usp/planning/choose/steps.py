"""What the ring ranks of a mesh compute and get, step by step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from usp.planning.layout import Layout
from usp.planning.masks.mask import Everything, Mask
from usp.planning.masks.options import make_mask
from usp.planning.plan import Plan, make_plan
from usp.planning.route import Cargo, Exchange
from usp.planning.samples import masks_of

CAUSAL: Mask = make_mask(causal=True, window_size=(None, None), cu_seqlens=None, prefix_len=None)
EVERYTHING: Mask = Everything()


@dataclass(frozen=True)
class Steps:
    """Of one ring rank, for a sample.

    Attributes:
        pairs: Of each step, the visible (query, key) pairs; the own keys first.
        rows: Of each step but the first, the rows of keys that come for it.
        queries: Rows of queries.
        sent, returned: Rows of keys that leave the rank in a pass, and rows of gradients.
        messages: In how many messages they leave.
    """

    pairs: tuple[float, ...]
    rows: tuple[float, ...]
    queries: float
    sent: float
    returned: float
    messages: int


def same_for_any_length(mask: Mask, layout: Layout) -> bool:
    """Whether there is a formula, so that nothing must be planned to know the work."""
    return mask == EVERYTHING or (mask == CAUSAL and layout in ("contiguous", "zigzag"))


@lru_cache(maxsize=4096)
def steps_of(
    mask: Mask, layout: Layout, lengths: tuple[int, int], ring: int, transport: str
) -> tuple[Steps, ...]:
    """Of the ring ranks that may be the busiest.

    Args:
        mask: Who sees whom.
        layout: Of queries and keys.
        lengths: Of queries and keys.
        ring: Ring degree.
        transport: "ring", "direct" or "allgather".
    """
    queries, keys = lengths
    if ring == 1 or (queries == keys and same_for_any_length(mask, layout)):
        return _formulas(mask, layout, queries, keys, ring, transport)
    ranks = sorted({0, ring // 4, ring // 2, 3 * ring // 4, ring - 2, ring - 1} & set(range(ring)))
    masks = masks_of(mask)
    return tuple(_planned(make_plan(masks, layout, lengths, ring, r, transport)) for r in ranks)


def _formulas(
    mask: Mask, layout: Layout, queries: int, keys: int, ring: int, transport: str
) -> tuple[Steps, ...]:
    """Where 2 ring divides the length these are exact, else nearly."""
    others, row, rows = ring - 1, queries / ring, keys / ring
    gathers = transport == "allgather"
    messages = 1 if gathers else others
    if ring == 1:
        return (Steps((_all_pairs(mask, queries, keys),), (), queries, 0, 0, 0),)
    if mask == EVERYTHING:
        whole_rows = (rows,) * others
        return (
            Steps((row * rows,) * ring, whole_rows, row, others * rows, others * rows, messages),
        )
    own = row * (row + 1) / 2
    # Each passes on what others further on need: of these formulas the tests are the proof.
    if layout == "contiguous":
        most = {"ring": max(ring - 2, min(2, others))}.get(transport, others) * rows
        last = most if gathers else 0  # nobody behind it sees its keys
        pairs = own, *(row * rows,) * others
        return (
            Steps(pairs, (rows,) * others, row, last, others * rows, messages),
            Steps((own,), (), row, most, (others - 1) * rows, messages),  # the one before it
        )
    chunk = row / 2
    pairs = chunk**2 + chunk * (chunk + 1), *(2 * chunk**2,) * others
    back = others
    if gathers:
        most = back = 2 * others
    elif transport == "ring" and ring > 3:
        most = back = 2 * ring - 3
    else:
        most = 2 * others
    come = (most * chunk / others,) * others
    first = 2 * others if gathers else others
    return (
        Steps(pairs, come, row, first * chunk, 2 * others * chunk, messages),
        Steps(pairs, come, row, most * chunk, back * chunk, messages),
    )


def _all_pairs(mask: Mask, queries: int, keys: int) -> float:
    if mask == EVERYTHING:
        return float(queries * keys)
    if mask == CAUSAL and queries == keys:
        return queries * (queries + 1) / 2
    return float(make_plan(masks_of(mask), "contiguous", (queries, keys), 1, 0).pairs)


def _planned(plan: Plan) -> Steps:
    def rows(messages: Iterable[Cargo]) -> int:
        return sum(len(some) for cargo in messages for some in cargo)

    pairs = tuple(float(step.pairs) for step in plan.steps)
    if plan.route is None:
        return Steps(pairs, (), len(plan.queries), 0, 0, 0)
    come = tuple(float(rows([arrival.cargo])) for arrival in plan.route.arrivals)
    sent, back = (
        [cargo for _, cargo in told(plan.ring_rank)]
        for told in (plan.route.sent, plan.route.returned)
    )
    messages = 1 if isinstance(plan.route, Exchange) else len(sent)
    return Steps(pairs, come, len(plan.queries), rows(sent), rows(back), messages)
