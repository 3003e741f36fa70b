"""Runs of True in the rows of a boolean table, found at about the speed of reading it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor

# More bands than this are more calls of a kernel than a bias is work.
MOST_BANDS = 32
_FIRST_ROWS = 64  # after which a table that takes too many bands has mostly shown it
_WORD = 8  # bytes, a value each, that are compared at a time
_ONES = 0x0101010101010101
Run = tuple[int, int, int]  # row, first key, key behind the last


def few_runs(mask: Tensor) -> Tensor | None:
    """Of a whole table, as ``runs_of`` has them; none if a row alone takes too many bands."""
    found = []
    for start, rows in ((0, mask[:_FIRST_ROWS]), (_FIRST_ROWS, mask[_FIRST_ROWS:])):
        part = runs_of(rows)
        part[:, 0] += start
        if (part[MOST_BANDS:, 0] == part[: max(0, len(part) - MOST_BANDS), 0]).any():
            return None
        found.append(part)
    return torch.cat(found)


def chains_of(runs: Iterable[Run], most: int | None = None) -> list[list[Run]] | None:
    """Runs of a table in order, each in the chain that it carries on, the nearest one; none where
    that makes more than ``most`` chains.

    A chain's ends never move back. It goes on in the next row, or behind its end after rows that it
    leaves out, in whose place nothing then fits between runs that overlap.
    """
    chains: list[list[Run]] = []
    beside: list[list[Run]] = []  # chains that end in the row before, in order
    older: list[list[Run]] = []  # by where they end
    before = -1
    for row, of_row in groupby(runs, itemgetter(0)):
        current: list[list[Run]] = []
        if row != before + 1:
            older, beside = sorted(older + beside, key=_last_key), []
        for run in of_row:
            i = (
                min(
                    bisect_right(beside, run[2], key=_last_key),
                    bisect_right(beside, run[1], key=_first_key),
                )
                - 1
            )
            j = bisect_right(older, run[1], key=_last_key) - 1
            if i >= 0 and (j < 0 or _last_key(beside[i]) >= _last_key(older[j])):
                chain = beside.pop(i)
            elif j >= 0:
                chain = older.pop(j)
            elif len(chains) == most:
                return None
            else:
                chains.append(chain := [])
            chain.append(run)
            current.append(chain)
        older = sorted(older + beside, key=_last_key)
        beside, before = current, row
    return chains


def _first_key(chain: list[Run]) -> int:
    return chain[-1][1]


def _last_key(chain: list[Run]) -> int:
    return chain[-1][2]


def runs_of(mask: Tensor) -> Tensor:
    """(runs, 3) int64: row, first key, key behind the last, of each run of True, in order.

    Rows are compared by words of eight values; only a word that is not the one before it is looked
    into.

    Args:
        mask: (rows, keys) bool.
    """
    row, place = _edges(mask.contiguous())
    return torch.stack((row[::2], place[::2], place[1::2]), 1)


def _edges(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Row and key of each value that is not the one before it, False before the first and behind
    the last, in order."""
    length = mask.shape[1]
    if length % _WORD or mask.storage_offset() % _WORD:
        mask = F.pad(mask, (0, -length % _WORD))
    if not mask.numel():
        nothing = mask.new_empty(0, dtype=torch.int64)
        return nothing, nothing
    words = mask.view(-1).view(torch.int64).view(len(mask), -1)
    differs = words.new_empty((len(words), words.shape[1] + 1), dtype=torch.bool)
    torch.ne(words[:, 1:], words[:, :-1], out=differs[:, 1:-1])
    torch.ne(words[:, 0], 0, out=differs[:, 0])
    torch.ne(words[:, -1], 0, out=differs[:, -1])  # a run that ends with the row
    row, word = differs.nonzero(as_tuple=True)
    if _repeats(words, row, word):
        differs.fill_(True)
        row, word = differs.nonzero(as_tuple=True)
    around = _WORD * word[:, None] + torch.arange(-1, _WORD, device=mask.device)
    inside = (around >= 0) & (around < mask.shape[1])
    values = mask.view(-1).take(row[:, None] * mask.shape[1] + around.where(inside, 0)) & inside
    which, place = (values[:, 1:] != values[:, :-1]).nonzero(as_tuple=True)
    return row[which], _WORD * word[which] + place


def _repeats(words: Tensor, row: Tensor, word: Tensor) -> bool:
    """Whether a word with edges inside is followed by its like, which shows no difference."""
    before_last = word < words.shape[1] - 1
    row, word = row[before_last], word[before_last]
    here = words[row, word]
    mixed = (here != 0) & (here != _ONES)
    return bool((mixed & (words[row, word + 1] == here)).any())
