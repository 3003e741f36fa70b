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
from usp.machine import cpu

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


def cost_table(settings: Settings, plain: Cost, alone: Cost, sharded: list[Cost]) -> Table:
    """A column for each run; of the sharded one the largest over its ranks."""
    from rich.table import Table

    table = Table(title="What did it take?", title_justify="left")
    table.add_column("")
    table.add_column("1 process\ntorch.nn", justify="right")
    table.add_column("1 process\nusp", justify="right")
    shape = f"{settings.ulysses_degree} ulysses x {settings.ring_degree} ring"
    table.add_column(f"{_processes(settings)}\nusp, {shape}", justify="right")
    ones = (plain, alone)
    table.add_row("device, threads each", *map(_where, ones), _where(sharded[0]))
    for name in ("forward", "backward"):
        each = [_seconds(name, [cost]) for cost in ones]
        table.add_row(f"{name}, seconds", *each, _seconds(name, sharded))
    for name, title in (
        ("peak_memory", "peak memory each"),
        ("memory_before", "  before the step"),
    ):
        each = [_mib(getattr(cost, name)) for cost in ones]
        table.add_row(title, *each, _range(sharded, name, _mib))
    for name in ("forward", "backward"):
        sent = _range(sharded, f"{name}_bytes", _count)
        table.add_row(f"{name}, bytes sent each", "0", "0", sent)
        formula = _range(sharded, f"{name}_bytes_expected", _count)
        table.add_row("  by the formula", "0", "0", formula)
    table.caption = f"peak memory: {memory_source(plain.device)}"
    table.caption_justify = "left"
    return table


def in_words(settings: Settings, plain: Cost, alone: Cost, sharded: list[Cost]) -> str:
    """What the figures mean, and what they do not."""
    seconds = [_both(cost) for cost in (plain, alone)]
    said = (
        f"One process with usp took {seconds[1] / seconds[0]:.2f} of the time that torch.nn took: "
        "the same work by other kernels. "
    )
    if settings.processes == 1:
        return said
    said += f"Each of {_processes(settings)} holds and computes a part of the sequence. "
    if not sharded[0].device.startswith("cpu"):
        return said + "They have a device each."
    threads = sum(cost.threads for cost in sharded)
    cores = len(cpu.cores())
    return said + (
        f"Here they share {cores} cores ({threads} threads in all, one process had "
        f"{plain.threads}), so all of them together are no faster than one: what falls is what "
        "each must hold. On machines of their own they would compute at once."
    )


def _processes(settings: Settings) -> str:
    return f"{settings.processes} process{'es' * (settings.processes > 1)}"


def _both(cost: Cost) -> float:
    return cost.forward_seconds + cost.backward_seconds


def _seconds(name: str, costs: list[Cost]) -> str:
    return f"{max(getattr(cost, f'{name}_seconds') for cost in costs):.2f}"


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
