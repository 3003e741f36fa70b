"""Random masks, and what each of them says of one query and one key, written down once more."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from random import Random

import torch
from torch import Tensor

from usp import masks
from usp.masks import Mask

# Whether query i sees key j.
Sees = Callable[[int, int], bool]


def any_mask(random: Random, query_len: int, key_len: int, depth: int = 2) -> tuple[Mask, Sees]:
    """A mask of some leaves, and its meaning."""
    if depth and random.random() < 0.7:
        one, one_sees = any_mask(random, query_len, key_len, depth - 1)
        if random.random() < 0.15:
            return ~one, lambda i, j: not one_sees(i, j)
        other, other_sees = any_mask(random, query_len, key_len, depth - 1)
        if random.random() < 0.5:
            return one & other, lambda i, j: one_sees(i, j) and other_sees(i, j)
        return one | other, lambda i, j: one_sees(i, j) or other_sees(i, j)
    return random.choice(LEAVES)(random, query_len, key_len)


def _causal(random: Random, query_len: int, key_len: int) -> tuple[Mask, Sees]:
    offset = random.choice([0, 0, random.randint(-9, 9)])
    return masks.causal(offset), lambda i, j: j <= i + offset


def _window(random: Random, query_len: int, key_len: int) -> tuple[Mask, Sees]:
    left, right = (random.choice([None, random.randint(0, 8)]) for _ in range(2))
    return masks.window(
        left, right
    ), lambda i, j: (left is None or j >= i - left) and (right is None or j <= i + right)


def _first_keys(random: Random, query_len: int, key_len: int) -> tuple[Mask, Sees]:
    count = random.randint(0, 5)
    return masks.first_keys(count), lambda i, j: j < count


def _first_queries(random: Random, query_len: int, key_len: int) -> tuple[Mask, Sees]:
    count = random.randint(0, 5)
    return masks.first_queries(count), lambda i, j: i < count


def _bounds(random: Random, total: int) -> tuple[int, ...]:
    return (0, *sorted(random.randint(0, total) for _ in range(random.randint(0, 4))), total)


def _part(bounds: tuple[int, ...], i: int) -> int:
    return sum(i >= bound for bound in bounds)


def _documents(random: Random, query_len: int, key_len: int) -> tuple[Mask, Sees]:
    if query_len != key_len:
        return _causal(random, query_len, key_len)
    bounds = _bounds(random, query_len)
    return masks.documents(bounds), lambda i, j: _part(bounds, i) == _part(bounds, j)


def _shared_prefix(random: Random, query_len: int, key_len: int) -> tuple[Mask, Sees]:
    if query_len != key_len:
        return _window(random, query_len, key_len)
    bounds = _bounds(random, query_len)
    return masks.shared_prefix(
        bounds
    ), lambda i, j: j < bounds[1] or _part(bounds, i) == _part(bounds, j)


def _blocks(random: Random, query_len: int, key_len: int) -> tuple[Mask, Sees]:
    bounds = _bounds(random, max(query_len, key_len))
    return masks.blocks(bounds), lambda i, j: _part(bounds, j) <= _part(bounds, i)


def _neighbourhood(random: Random, query_len: int, key_len: int) -> tuple[Mask, Sees]:
    start, length = random.randint(0, 2), min(query_len, key_len)
    grid: list[int] = []
    while len(grid) < 3 and (not grid or random.random() < 0.7):
        grid.append(random.randint(1, 5))
    if start + prod(grid) > length:
        grid, start = [length], 0
    dims = len(grid)
    kernel = [random.randint(1, 5) for _ in grid]
    dilation = [random.choice([1, 1, 2]) for _ in grid]
    causal = [random.random() < 0.3 for _ in grid]
    edges = random.choice(["clip", "shift"])
    mask = masks.neighbourhood(
        grid, kernel, causal=causal, dilation=dilation, edges=edges, start=start
    )

    def sees(i: int, j: int) -> bool:
        if not (start <= i < start + prod(grid) and start <= j < start + prod(grid)):
            return False
        query, key = (_coordinates(p - start, grid) for p in (i, j))
        return all(
            key[d] in axis_neighbours(query[d], grid[d], kernel[d], dilation[d], causal[d], edges)
            for d in range(dims)
        )

    return mask, sees


def _coordinates(place: int, grid: list[int]) -> list[int]:
    found = []
    for size in reversed(grid):
        place, rest = divmod(place, size)
        found.insert(0, rest)
    return found


def axis_neighbours(
    x: int, size: int, kernel: int, dilation: int, causal: bool, edges: str
) -> set[int]:
    """The definition: of all the keys of the query's residue, those in the window."""
    keys = [k for k in range(size) if k % dilation == x % dilation]
    place = keys.index(x)
    if causal:
        return set(keys[max(0, place - kernel + 1) : place + 1])
    before = kernel // 2
    if edges == "shift" and len(keys) >= kernel:
        # of the windows of so many keys the one nearest to the centred one
        begin = min(range(len(keys) - kernel + 1), key=lambda at: abs(at - (place - before)))
        return set(keys[begin : begin + kernel])
    if edges == "shift":
        return set(keys)
    return {keys[a] for a in range(place - before, place - before + kernel) if 0 <= a < len(keys)}


def _dense(random: Random, query_len: int, key_len: int) -> tuple[Mask, Sees]:
    left, right = (random.randint(0, 8) for _ in range(2))
    i, j = torch.arange(query_len)[:, None], torch.arange(key_len)
    blind = torch.tensor([random.random() < 0.1 for _ in range(query_len)], dtype=torch.bool)
    dense = (j >= i - left) & (j <= i + right) & ~blind[:, None]
    table = dense.tolist()
    return masks.from_dense(dense), lambda i, j: table[i][j]


LEAVES = [
    _causal,
    _window,
    _first_keys,
    _first_queries,
    _documents,
    _shared_prefix,
    _blocks,
    _neighbourhood,
    _neighbourhood,
    _dense,
]


def table_of(sees: Sees, query_len: int, key_len: int) -> Tensor:
    """(query_len, key_len) bool."""
    rows = [[sees(i, j) for j in range(key_len)] for i in range(query_len)]
    return torch.tensor(rows, dtype=torch.bool).reshape(query_len, key_len)
