"""Masks that are told by a table: a boolean matrix, or a function of two positions."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from usp.planning.masks import bands
from usp.planning.masks.bands import Bands
from usp.planning.masks.mask import Mask
from usp.planning.masks.runs import MOST_BANDS, Run, chains_of, few_runs, runs_of

_VALUES_AT_ONCE = 1 << 24
_MOST_COUNTED = 1 << 19  # runs, to say how many bands they would take: about a second
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Table(Mask):
    """Bands that are written down; made by ``from_dense`` and ``from_function``.

    Attributes:
        query_len, key_len: Of the whole sequences.
        code: (4,) int64, the digest as a graph can read it.
        ends: (first, stop), each (bands, query_len) int64.
        digest: Of all ends, by which tables compare.
    """

    query_len: int
    key_len: int
    code: Tensor = field(compare=False, repr=False)
    ends: Bands = field(compare=False, repr=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        digest = array("q", self.code.tolist()).tobytes().hex()
        object.__setattr__(self, "digest", digest)

    def bands(self, positions: Tensor, key_len: int, trim: bool = True) -> Bands:
        # queries outside the table see nothing, before its keys or behind them
        place = (positions + 1).clamp(0, self.query_len + 1)
        ends = (end.to(positions.dtype) for end in self.ends)
        first, stop = (F.pad(F.pad(end, (1, 0)), (0, 1), value=key_len) for end in ends)
        found = Bands(first.index_select(1, place), stop.index_select(1, place))
        return bands.without_empty(found, trim)

    def refuse_lengths(self, query_len: int, key_len: int) -> None:
        if (query_len, key_len) != (self.query_len, self.key_len):
            raise ValueError(
                f"the mask was made of {self.query_len} queries and {self.key_len} keys, but the "
                f"whole sequences have {query_len} and {key_len}"
            )

    def __repr__(self) -> str:
        size = f"{self.query_len} x {self.key_len}"
        return f"<{size} in {len(self.ends.first)} bands, {self.digest[:16]}>"


def from_dense(mask: Tensor) -> Mask:
    """A boolean mask as bands, exactly.

    Args:
        mask: (queries, keys) bool on CPU, True where a query sees a key.

    Raises:
        TypeError: it is no bool tensor on the CPU.
        ValueError: it has not two dims, or its rows are not a few runs of keys that move on from
            query to query, ``MOST_BANDS`` bands of them at most: says how many it would take.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.device.type != "cpu":
        said = f"{mask.dtype} on {mask.device}" if isinstance(mask, Tensor) else repr(mask)
        raise TypeError(f"a mask of values must be a bool tensor on the CPU, got {said}")
    if mask.dim() != 2:
        raise ValueError(f"a mask must be (queries, keys), got shape {tuple(mask.shape)}")
    return in_few_bands(mask) or _refuse(map(tuple, runs_of(mask).tolist()))


def in_few_bands(mask: Tensor) -> Mask | None:
    """As ``from_dense``, or none where it refuses, without counting."""
    runs = few_runs(mask)
    return None if runs is None else _table(map(tuple, runs.tolist()), *mask.shape)


def from_function(
    mask_mod: Callable[[Any, Any, Tensor, Tensor], Tensor], lengths: tuple[int, int]
) -> Mask:
    """A function of positions as bands, exactly; FlexAttention's ``mask_mod``.

    It is called for all pairs, so many rows at a time: for sequences of some ten thousand tokens.

    Args:
        mask_mod: Of (batch, head, query position, key position), elementwise; True where the
            query sees the key. It must not use the first two, which are refused.
        lengths: Queries and keys of the whole sequences.

    Raises:
        ValueError: as ``from_dense``. TypeError: it uses the batch or the head.
    """
    query_len, key_len = lengths
    rows = max(1, _VALUES_AT_ONCE // max(1, key_len))
    keys = torch.arange(key_len, device=_HOST)[None]

    def found() -> Iterator[Run]:
        for start in range(0, query_len, rows):
            queries = torch.arange(start, min(start + rows, query_len), device=_HOST)[:, None]
            seen = mask_mod(_Unknown("batch"), _Unknown("head"), queries, keys)
            part = runs_of(torch.as_tensor(seen).bool().expand(len(queries), key_len))
            yield from map(tuple, (part + part.new_tensor([start, 0, 0])).tolist())

    return _table(found(), query_len, key_len) or _refuse(found())


class _Unknown:
    """Stands for a sample or head: a mask is one for all."""

    def __init__(self, name: str):
        self._name = name

    def _refuse(self, *_: object) -> Any:
        raise TypeError(
            f"mask_mod uses its {self._name}, but a mask is the same for all: make one for each "
            "sample (mask=[...]), or pass attn_bias"
        )

    __index__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __mod__ = __floordiv__ = _refuse
    __hash__ = None  # type: ignore[assignment]


def _refuse(runs: Iterable[Run]) -> NoReturn:
    counted = list(islice(runs, _MOST_COUNTED))
    at_least = "at least " if len(counted) == _MOST_COUNTED else ""
    raise ValueError(
        f"the mask would take {at_least}{len(chains_of(counted) or ())} bands, intervals of keys "
        f"whose ends never move back from query to query, and {MOST_BANDS} are the most: pass it "
        "as attn_bias, -inf where it hides"
    )


def _table(runs: Iterable[Run], query_len: int, key_len: int) -> Mask | None:
    made = chains_of(runs, MOST_BANDS)
    if made is None:
        return None
    found = bands.nothing(torch.arange(query_len, device=_HOST))
    if made:
        first, stop = (
            torch.stack(end) for end in zip(*(_ends(b, query_len) for b in made), strict=True)
        )
        found = bands.disjoint(first, stop)
    told = array("q", torch.stack(found).flatten().tolist()).tobytes()
    code = torch.tensor(array("q", hashlib.sha256(told).digest()), device=_HOST)
    return Table(query_len, key_len, code, found)


def _ends(band: list[Run], query_len: int) -> tuple[Tensor, Tensor]:
    """Both ends for every row; one that the band leaves out is empty where the last run stopped."""
    rows, first, stop = torch.tensor([(-1, 0, 0), *band], device=_HOST).unbind(1)
    every = torch.arange(query_len, device=_HOST)
    run = torch.searchsorted(rows.contiguous(), every, right=True) - 1
    return torch.where(rows[run] == every, first[run], stop[run]), stop[run]
