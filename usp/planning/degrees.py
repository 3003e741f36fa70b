"""A degree for every document: how many ranks share it, and which, so that all are done soon.

A long document needs many ranks; a short one, cut over many, is mostly messages. Ranks form groups
inside groups, the whole mesh, its halves, and so on to single ranks. A document is given to one of
these groups. All groups work off their documents from the largest degree down, so a rank waits for
no one but the ranks that it computes with. Where ranks share cores, what one does not compute is
time for the others.

Sources: FlexSP (arXiv:2412.01523) and ByteScale (arXiv:2502.21231), which choose degrees for the
sequences of a batch by a cost model; the search here is our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import product
from typing import NamedTuple

_THRESHOLDS = 48  # tried for when a document is cut
_MOVED = 4  # documents that are tried elsewhere in a round
_ROUNDS = 64  # of moving single documents of the rank that is done last


@dataclass(frozen=True)
class DocumentCost:
    """Seconds of one layer, forward and backward; only their ratios matter.

    Attributes:
        token: Of a token, in all that sees tokens one by one: projections, MLP, norms.
        pair: Of a query and a key that it sees.
        sent: Of a token whose key and value pass from rank to rank (the ring).
        hop: Of one message, however short, times the ranks it passes.
        exchanged: Of a token that leaves with q, k, v and comes back as out (Ulysses).
        call: Of a call of attention, however short, and once more for each axis of its mesh: a rank
            makes one for each size of groups in which it has documents.
    """

    token: float
    pair: float
    sent: float = 0.0
    hop: float = 0.0
    exchanged: float = 0.0
    call: float = 0.0

    def __post_init__(self) -> None:
        for name, seconds in vars(self).items():
            if not 0 <= seconds < float("inf"):
                raise ValueError(f"DocumentCost.{name} must be 0 or more seconds, got {seconds}")

    @classmethod
    def of_layer(
        cls,
        hidden: int,
        mlp: int,
        *,
        kv_hidden: int | None = None,
        flops: float = 1e12,
        bandwidth: float = 1e10,
        latency: float = 2e-5,
        bytes_per_number: int = 2,
    ) -> DocumentCost:
        """Of a transformer's layer, training.

        Args:
            hidden: Features of a token, those of all query heads together.
            mlp: Features inside the MLP, of two matrices.
            kv_hidden: Those of all key heads together; ``hidden`` by default.
            flops: That a rank reaches in a second.
            bandwidth: Bytes that a rank sends in a second.
            latency: Seconds of a short message.
            bytes_per_number: Of a key or a value.
        """
        kv = hidden if kv_hidden is None else kv_hidden
        weights = 2 * hidden * (hidden + kv) + 2 * hidden * mlp
        # forward: 2 FLOP a weight and a number of a pair; backward twice that, 2.5 times in pairs
        return cls(
            token=3 * 2 * weights / flops,
            pair=3.5 * 4 * hidden / flops,
            # keys and values there in both passes, and their gradients home in fp32
            sent=2 * kv * (2 * bytes_per_number + 4) / bandwidth,
            hop=3 * latency,
            exchanged=2 * 2 * (hidden + kv) * bytes_per_number / bandwidth,
        )

    def of_document(self, tokens: int, ring: int, ulysses: int = 1) -> float:
        """Seconds of each rank of a ring x Ulysses group, causal; pairs are balanced over them."""
        ranks, pairs = ring * ulysses, tokens * (tokens + 1) / 2
        passed = tokens * (ring - 1) / ranks  # from all other rows of the ring, 1/ulysses of heads
        scattered = tokens / ranks * (ulysses - 1) / ulysses
        computed = (self.token * tokens + self.pair * pairs) / ranks
        return computed + self.sent * passed + self.exchanged * scattered

    def of_group(self, ring: int, ulysses: int = 1) -> float:
        """Seconds of a group's call and its messages, whatever it holds."""
        axes = (ring > 1) + (ulysses > 1)
        return self.call * (1 + axes) + self.hop * (ring - 1 + (ulysses > 1))


class Shared(NamedTuple):
    """Ranks that compute on the same cores, of which so many compute at once."""

    ranks: tuple[int, ...]
    at_once: float


class Placed(NamedTuple):
    """Where a document is: on the ranks ``[group * degree, (group + 1) * degree)``."""

    degree: int
    group: int


@dataclass(frozen=True)
class Degrees:
    """Where all documents are.

    Attributes:
        placed: Of each document.
        loads: Seconds of each rank by the cost model, on cores of its own, and its tokens, rounded
            up.
        shared: Ranks that have no cores of their own.
    """

    placed: tuple[Placed, ...]
    loads: tuple[tuple[float, int], ...]
    shared: tuple[Shared, ...] = ()

    @property
    def makespan(self) -> float:
        """Seconds: of the busiest rank, or of the cores that have most to do, whatever is more."""
        busiest = max(seconds for seconds, _ in self.loads)
        return max(busiest, *(self.seconds_of(each) for each in self.shared), 0.0)

    def seconds_of(self, shared: Shared) -> float:
        """Of cores that ranks share, where none of these waits."""
        return sum(self.loads[rank][0] for rank in shared.ranks) / shared.at_once


def nested_degrees(ring: int, ulysses: int) -> list[tuple[int, int]]:
    """(ring, ulysses) of the mesh and of ever smaller ones inside, to one rank."""
    found = [(ring, ulysses)]
    while ring * ulysses > 1:
        if ring > 1:
            ring //= _smallest_prime(ring)
        else:
            ulysses //= _smallest_prime(ulysses)
        found.append((ring, ulysses))
    return found


def _smallest_prime(number: int) -> int:
    return next(p for p in range(2, number + 1) if number % p == 0)


def choose_degrees(
    lengths: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    cost: DocumentCost,
    most_tokens: int | None = None,
    shared: Sequence[Shared] = (),
) -> Degrees:
    """A degree and a place for each document, for a short makespan.

    A threshold of seconds gives each document the least degree at which it stays below; documents
    then go one by one, longest first, to the group that is done first. The best of many thresholds
    is improved by single moves. Deterministic: ranks that know the lengths agree.

    Args:
        lengths: Tokens of each document.
        sizes: (ring, ulysses) of the nested groups, from all ranks to 1: ``nested_degrees``.
        cost: Of one layer.
        most_tokens: That a rank has room for.
        shared: Ranks that compute on the same cores; others have their own.

    Raises:
        ValueError: the tokens have no room; says both numbers.
    """
    groups = {ring * ulysses: (ring, ulysses) for ring, ulysses in sizes}
    ranks, total = max(groups), sum(lengths)
    if most_tokens is not None and total > ranks * most_tokens:
        raise ValueError(
            f"{total} tokens do not fit {ranks} ranks of {most_tokens} tokens (most_tokens): take "
            "fewer documents at once, or more ranks"
        )
    rising = sorted(groups)

    def least(tokens: int, seconds: float) -> int:
        fits = (d for d in rising if cost.of_document(tokens, *groups[d]) <= seconds)
        return next(fits, ranks)

    distinct = set(lengths)
    seconds = [cost.of_document(n, *size) for n, size in product(distinct, sizes)]
    high = max(seconds, default=0.0)
    tried = {high * (1 / 1024) ** (i / _THRESHOLDS) for i in range(_THRESHOLDS + 1)} | {0.0}
    room = _Room(groups, most_tokens, tuple(shared))
    best: Degrees | None = None
    # many thresholds choose alike
    for degrees in dict.fromkeys(
        tuple(least(n, threshold) for n in lengths) for threshold in sorted(tried, reverse=True)
    ):
        found = _place(lengths, degrees, cost, room)
        if found is not None and (best is None or found.makespan < best.makespan):
            best = found
    if best is None:
        raise ValueError(
            f"{len(lengths)} documents of {total} tokens, the longest of {max(lengths)}, do not "
            f"fit {ranks} ranks of {most_tokens} tokens (most_tokens) whole: leave more room"
        )
    return _improved(best, lengths, cost, room)


class _Room(NamedTuple):
    """What a placement keeps to: sizes of groups, tokens of a rank, and who shares cores."""

    sizes: Mapping[int, tuple[int, int]]
    most_tokens: int | None
    shared: tuple[Shared, ...]


def _place(
    lengths: Sequence[int],
    chosen: Sequence[int],
    cost: DocumentCost,
    room: _Room,
) -> Degrees | None:
    """Documents of these degrees in groups, the largest groups first; None without room."""
    sizes, most_tokens, shared = room
    ranks = max(sizes)
    loads = [(0.0, 0)] * ranks
    placed = [Placed(1, 0)] * len(lengths)
    for degree in sorted(sizes, reverse=True):
        own = [i for i, each in enumerate(chosen) if each == degree and lengths[i]]
        if not own:
            continue
        # inside a group all ranks are equal yet: only larger degrees have been placed
        groups = [(*loads[g * degree], g) for g in range(ranks // degree)]
        heapify(groups)
        started = set()
        for i in sorted(own, key=lambda i: -lengths[i]):
            seconds, tokens, group = heappop(groups)
            if group not in started:
                started.add(group)
                seconds += cost.of_group(*sizes[degree])
            seconds += cost.of_document(lengths[i], *sizes[degree])
            tokens += -(-lengths[i] // degree)
            if most_tokens is not None and tokens > most_tokens:
                return None
            heappush(groups, (seconds, tokens, group))
            placed[i] = Placed(degree, group)
        for seconds, tokens, group in groups:
            loads[group * degree : (group + 1) * degree] = [(seconds, tokens)] * degree
    return Degrees(tuple(placed), tuple(loads), shared)


def _improved(best: Degrees, lengths: Sequence[int], cost: DocumentCost, room: _Room) -> Degrees:
    """Documents of those who are done last to the next degrees, as long as that helps."""
    degrees = sorted(room.sizes, reverse=True)
    for _ in range(_ROUNDS):
        found = best
        for i in _last_done(best, lengths):
            at = degrees.index(best.placed[i].degree)
            for degree in degrees[max(0, at - 1) : at + 2]:
                chosen = [placed.degree for placed in best.placed]
                chosen[i] = degree
                moved = _place(lengths, chosen, cost, room)
                if moved is not None and moved.makespan < found.makespan:
                    found = moved
        if found is best:
            return best
        best = found
    return best


def _last_done(found: Degrees, lengths: Sequence[int]) -> list[int]:
    """The longest documents of the rank that is done last; of cores that are, those that are cut,
    for these have less to do where fewer ranks share a document."""
    seconds = [load for load, _ in found.loads]
    last: tuple[int, ...] = (seconds.index(max(seconds)),)
    least = 1
    for shared in found.shared:
        if found.seconds_of(shared) == found.makespan > max(seconds):
            last, least = shared.ranks, 2
    theirs = (
        i
        for i, (degree, group) in enumerate(found.placed)
        if lengths[i] and degree >= least and group in {rank // degree for rank in last}
    )
    return sorted(theirs, key=lambda i: -lengths[i])[:_MOVED]
