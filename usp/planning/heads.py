"""Which heads each rank of a row holds, and how tensors are cut for it: pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

from usp.planning.shares import pieces


@dataclass(frozen=True)
class Heads:
    """The run of query heads that this rank holds, and the key heads that they read.

    Attributes:
        offset, count: First query head and number of them.
        total: Query heads of the whole attention.
        group_size: Query heads that share a key head, in the whole attention.
    """

    offset: int
    count: int
    total: int
    group_size: int

    @property
    def kv_range(self) -> tuple[int, int]:
        """First and one past the last key head that the query heads read."""
        first = self.offset // self.group_size
        return first, first if not self.count else (
            self.offset + self.count - 1
        ) // self.group_size + 1

    @cached_property
    def kv_index(self) -> tuple[int, ...]:
        """For each query head here the key head it reads, counted from the first one here."""
        first = self.offset // self.group_size
        return tuple((self.offset + h) // self.group_size - first for h in range(self.count))


@lru_cache(maxsize=256)
def split_heads(num_heads: int, num_kv_heads: int, degree: int) -> tuple[Heads, ...]:
    """The query heads of each rank of a row, as even as they come; possibly none.

    Args:
        num_heads, num_kv_heads: H and G, H a multiple of G.
        degree: Ranks of the row.
    """
    counts = pieces(num_heads, degree)
    group_size = num_heads // num_kv_heads
    return tuple(
        Heads(sum(counts[:rank]), count, num_heads, group_size) for rank, count in enumerate(counts)
    )


def head_groups(heads: Heads, groups: int) -> tuple[Heads, ...]:
    """A rank's query heads in groups that share no key head, as even as they come.

    Args:
        heads: Of the rank.
        groups: How many; those that have no key head left are empty.
    """
    first, stop = heads.kv_range
    ends = list(accumulate(pieces(stop - first, groups), initial=first))
    found = []
    for low, high in pairwise(ends):
        start = max(heads.offset, low * heads.group_size)
        end = min(heads.offset + heads.count, high * heads.group_size)
        found.append(replace(heads, offset=start, count=max(0, end - start)))
    return tuple(found)


def kv_heads_shared(heads: Sequence[Heads]) -> bool:
    """Whether some key head is read on several ranks."""
    held = [rank.kv_range for rank in heads if rank.count]
    return any(later[0] < earlier[1] for earlier, later in pairwise(held))


@dataclass(frozen=True)
class Cut:
    """How one tensor is cut among the ranks of a row.

    Attributes:
        lengths: Tokens of each rank before the exchange.
        heads: First and one past the last head of each rank after it; runs may overlap.
    """

    lengths: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]

    @classmethod
    def of_query_heads(cls, lengths: tuple[int, ...], heads: Sequence[Heads]) -> Cut:
        """For what has a place for each query head."""
        return cls(lengths, tuple((h.offset, h.offset + h.count) for h in heads))

    @classmethod
    def of_key_heads(cls, lengths: tuple[int, ...], heads: Sequence[Heads]) -> Cut:
        """For k and v: the key heads that the query heads read."""
        return cls(lengths, tuple(h.kv_range for h in heads))

    @classmethod
    def one_for_each(cls, lengths: tuple[int, ...]) -> Cut:
        """For what has no heads and goes whole to every rank: one "head" each."""
        return cls(lengths, tuple((rank, rank + 1) for rank in range(len(lengths))))
