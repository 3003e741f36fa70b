"""A plan as a picture: which keys each rank's queries see, and by which step they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

import torch
from torch import Tensor

from usp.cli.console import UserError
from usp.planning.plan import Plan
from usp.planning.visit import Visit

HIDDEN, _SIGNS = ".", digits + ascii_letters
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class Picture:
    """Rectangles of some queries of a rank and some keys, in lines and columns.

    Attributes:
        pairs: Of each rank (steps, lines, columns) int64, the visible pairs of each rectangle.
        queries: Of each rank (lines,) int64, how many queries a line stands for.
        keys: (ranks, columns) int64, how many keys of each owner a column stands for.
    """

    pairs: tuple[Tensor, ...]
    queries: tuple[Tensor, ...]
    keys: Tensor


def draw(plans: Sequence[Plan], columns: int, lines: int) -> Picture | None:
    """Count what the plans of all ring ranks say; None where there is nothing to see.

    Args:
        columns: At most so many, for all keys.
        lines: About so many for all ranks together, one at least for each that has queries.
    """
    rows = plans[0].keys
    key_len = sum(map(len, rows))
    columns = min(columns, key_len)
    if not columns or not any(len(plan.queries) for plan in plans):
        return None
    edge = (torch.arange(columns + 1, device="cpu") * key_len + columns - 1) // columns
    keys = torch.stack([torch.searchsorted(row.tensor, edge).diff() for row in rows])
    of_rank = max(1, lines // len(plans))
    line = [_lines(len(plan.queries), of_rank) for plan in plans]
    return Picture(
        tuple(_counted(plan, which, edge) for plan, which in zip(plans, line, strict=True)),
        tuple(which.bincount() for which in line),
        keys,
    )


def _lines(num_queries: int, most: int) -> Tensor:
    """The line of each query of a rank."""
    query = torch.arange(num_queries, device="cpu")
    return query * min(num_queries, most) // max(1, num_queries)


def _counted(plan: Plan, line: Tensor, edge: Tensor) -> Tensor:
    lines = int(line[-1]) + 1 if len(line) else 0
    pairs = edge.new_zeros((len(plan.steps), lines, len(edge) - 1))
    for step, seen in zip(plan.steps, pairs, strict=True):
        for load in step.loads:
            here = plan.keys[step.owner].tensor[load.rows.index]
            for visit in load.visits:
                _count(visit, line, torch.searchsorted(here, edge), seen)
    return pairs


def _count(visit: Visit, line: Tensor, edge: Tensor, seen: Tensor) -> None:
    """Add the pairs of one visit, whose keys are cut at ``edge``, to (lines, columns)."""
    for start in range(0, len(line), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        low, high = edge[:-1].expand(len(line[rows]), -1), edge[1:].expand(len(line[rows]), -1)
        if visit.span is not None:
            low = torch.maximum(low, visit.span.first[rows, None])
            high = torch.minimum(high, visit.span.stop[rows, None])
        seen.index_add_(0, line[rows], (high - low).clamp_min(0))


def in_signs(picture: Picture) -> str:
    """The picture in characters, and what they mean."""
    owner = "".join(_sign(int(i)) for i in picture.keys.argmax(0))
    said = [f"  {'owner of keys':14}{owner}"]
    for rank, pairs in enumerate(picture.pairs):
        most, step = pairs.max(0)
        for index, (here, steps) in enumerate(zip(most.tolist(), step.tolist(), strict=True)):
            name = "" if index else f"queries of {rank}"
            signs = (_sign(s) if n else HIDDEN for n, s in zip(here, steps, strict=True))
            said.append(f"  {name:14}{''.join(signs)}".rstrip())
    last = max(len(pairs) for pairs in picture.pairs) - 1
    come = f", 1 to {last} by those of the steps above" if last else ""
    said.append(f"  {HIDDEN} hidden, 0 seen with the own keys{come}")
    queries, keys = (int(torch.cat(x).max()) for x in (picture.queries, (picture.keys.sum(0),)))
    if (queries, keys) != (1, 1):
        said.append(
            f"  a character stands for up to {queries} x {keys} pairs; it is seen where one of "
            "them is, by the step of most"
        )
    return "which keys are seen, and by which step they come\n" + "\n".join(said)


def _sign(number: int) -> str:
    return _SIGNS[number] if number < len(_SIGNS) else "+"


def colours(count: int) -> list[tuple[float, float, float]]:
    """Red, green and blue of each step."""
    from matplotlib import colormaps

    named = colormaps["tab10"] if count <= 10 else colormaps["turbo"].resampled(count)
    return [(r, g, b) for r, g, b, _ in map(named, range(count))]


def in_colours(picture: Picture, steps: int) -> Any:
    """(lines of all ranks, columns, 3) floats: the colours of steps, paler where little is seen."""
    palette = torch.tensor(colours(steps), dtype=torch.float64, device="cpu")
    parts = []
    for pairs, queries in zip(picture.pairs, picture.queries, strict=True):
        seen = pairs.sum(0).double()
        mean = torch.einsum("slc,sd->lcd", pairs.double(), palette[: len(pairs)])
        share = seen / (queries[:, None] * picture.keys.sum(0))
        paint = torch.where(seen > 0, 0.3 + 0.7 * share, 0)[..., None]
        parts.append(1 - paint + paint * mean / seen.clamp_min(1)[..., None])
    return torch.cat(parts).clamp(0, 1).numpy()


def save(picture: Picture, path: Path, title: str) -> None:
    """Write the picture as a PNG: rows are queries by rank, columns keys, colours steps.

    Raises:
        UserError: matplotlib is not there.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise UserError("--png needs matplotlib: pip install matplotlib") from error
    steps = max(len(pairs) for pairs in picture.pairs)
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    lines = [len(queries) for queries in picture.queries]
    key_len, height = int(picture.keys.sum()), sum(lines)
    axes.imshow(
        in_colours(picture, steps),
        extent=(0, key_len, height, 0),
        aspect="auto",
        interpolation="nearest",
    )
    ends = torch.tensor(lines).cumsum(0).tolist()
    for end in ends[:-1]:
        axes.axhline(end, color="black", linewidth=0.6)
    axes.set_yticks([end - n / 2 for end, n in zip(ends, lines, strict=True)])
    axes.set_yticklabels([f"rank {rank}" for rank in range(len(lines))])
    axes.set_xlabel("keys")
    axes.set_ylabel("queries")
    axes.set_title(title, fontsize=9, wrap=True)
    names = ["own keys", *(f"step {step}" for step in range(1, steps))]
    patches = [Patch(color=c, label=n) for c, n in zip(colours(steps), names, strict=True)]
    figure.legend(handles=patches, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110, format="png")
