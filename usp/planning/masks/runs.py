"""Runs of True in the rows of a boolean table, found at about the speed of reading it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# More bands than this are more calls of a kernel than a bias is work.
MOST_BANDS = 32
_FIRST_ROWS = 64  # after which a table that takes too many bands has mostly shown it
_WORD = 8  # bytes, a value each, that are compared at a time
_ONES = 0x0101010101010101
Run = tuple[int, int, int]  # row, first key, key behind the last


def too_many_bands(row: int) -> ValueError:
    """Of a table that is no mask of a few bands, as a query shows."""
    return ValueError(
        f"the mask would take more than {MOST_BANDS} bands, intervals of keys whose ends never "
        f"move back from query to query (at query {row}): pass it as attn_bias, -inf where it hides"
    )


def all_runs(mask: Tensor, most: int) -> Tensor:
    """Of a whole table, as ``runs_of`` has them.

    Raises:
        ValueError: a row has more than ``most``.
    """
    found = []
    for start, rows in ((0, mask[:_FIRST_ROWS]), (_FIRST_ROWS, mask[_FIRST_ROWS:])):
        part = runs_of(rows)
        part[:, 0] += start
        behind = part[most:, 0] == part[: max(0, len(part) - most), 0]
        if behind.any():
            raise too_many_bands(int(part[most:, 0][behind][0]))
        found.append(part)
    return torch.cat(found)


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
