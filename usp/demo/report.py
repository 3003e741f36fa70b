"""The table and the picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from usp.demo.compare import Difference
from usp.demo.image import PatchGrid, crop
from usp.demo.measure import Cost, memory_source
from usp.demo.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table


def difference_table(settings: Settings, differences: list[Difference]) -> Table:
    """One row for each compared tensor."""
    from rich.table import Table

    title = f"Is it the same? Allowed: {settings.tolerance:.0e} of the largest value"
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for column in ("largest\ndifference", "largest\nvalue", "relative"):
        table.add_column(column, justify="right")
    for d in differences:
        good = d.relative <= settings.tolerance
        table.add_row(
            d.name,
            f"{d.absolute:.2e}",
            f"{d.largest:.3g}",
            f"[{'green' if good else 'bold red'}]{d.relative:.1e}[/]",
        )
    return table


def cost_table(settings: Settings, plain: Cost, sharded: list[Cost]) -> Table:
    """One column for the plain run, one for the sharded run: the largest over its ranks."""
    from rich.table import Table

    table = Table(title="What did it take?", title_justify="left")
    table.add_column("")
    table.add_column("1 process\ntorch.nn", justify="right")
    processes = f"{settings.processes} process{'es' * (settings.processes > 1)}"
    shape = f"{settings.ulysses_degree} ulysses x {settings.ring_degree} ring"
    table.add_column(f"{processes}\nusp, {shape}", justify="right")

    def row(name: str, one: str, many: str) -> None:
        table.add_row(name, one, many)

    row("device, threads each", _where(plain), _where(sharded[0]))
    for name in ("forward", "backward"):
        most = max(getattr(cost, f"{name}_seconds") for cost in sharded)
        row(f"{name}, seconds", f"{getattr(plain, f'{name}_seconds'):.2f}", f"{most:.2f}")
    row("peak memory each", _mib(plain.peak_memory), _range(sharded, "peak_memory", _mib))
    before = _range(sharded, "memory_before", _mib)
    row("  of it before the step", _mib(plain.memory_before), before)
    for name in ("forward", "backward"):
        row(f"{name}, bytes sent each", "0", _range(sharded, f"{name}_bytes", _count))
        row("  by the formula", "0", _range(sharded, f"{name}_bytes_expected", _count))
    table.caption = f"peak memory: {memory_source(plain.device)}"
    table.caption_justify = "left"
    return table


def _where(cost: Cost) -> str:
    return f"{cost.device.split(':')[0]}, {cost.threads}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _count(size: int) -> str:
    return f"{size:,}"


def _range(costs: list[Cost], name: str, show: Callable[[int], str]) -> str:
    """The smallest and the largest of the ranks, once if they are equal."""
    values = [getattr(cost, name) for cost in costs]
    ends = dict.fromkeys((show(min(values)), show(max(values))))
    return " to ".join(ends)


def save_picture(
    path: Path,
    photograph: np.ndarray[Any, Any],
    grid: PatchGrid,
    attention: Tensor,
    queries: list[int],
) -> None:
    """The photograph beside the attention maps of some patches, head by head.

    Args:
        path: File to write; its suffix names the format.
        photograph: (height, width, 3) uint8.
        grid: Cut from the photograph.
        attention: (Q, heads, tokens), rows of the attention matrix.
        queries: The Q patches whose rows these are.
    """
    from matplotlib.figure import Figure

    count, heads, tokens = attention.shape
    picture = crop(photograph, grid)
    extent = (0, picture.shape[1], picture.shape[0], 0)
    # Against even attention: 0 is 1 / tokens, 1 ten times as much.
    maps = (attention * tokens).clamp_min(1e-3).log10().view(count, heads, grid.rows, grid.columns)
    figure = Figure(figsize=(3.4 * (heads + 1), 3.3 * count), layout="constrained")
    axes = figure.subplots(count, heads + 1, squeeze=False)
    for row, (query, of_heads) in enumerate(zip(queries, maps, strict=True)):
        y, x = divmod(query, grid.columns)
        axes[row, 0].imshow(picture)
        axes[row, 0].set_title(f"patch ({y}, {x}) looks at")
        for head, shown in enumerate(of_heads):
            image = axes[row, head + 1].imshow(
                shown.numpy(), cmap="magma", vmin=-1, vmax=1.5, extent=extent
            )
            axes[row, head + 1].set_title(f"head {head + 1}")
        for axis in axes[row]:
            axis.plot(grid.patch_size * (x + 0.5), grid.patch_size * (y + 0.5), "+c", markersize=14)
            axis.set_axis_off()
    figure.colorbar(image, ax=axes, shrink=0.8, label="log10(attention weight x tokens)")
    figure.suptitle("Hubble eXtreme Deep Field (NASA/ESA): where a bright and a dark patch look")
    figure.savefig(path, dpi=100)
