"""What sharding is for: a sequence that one process cannot hold in a limit, and several can."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usp.demo.compare import Difference
from usp.demo.limit import OutOfMemory, can_limit
from usp.demo.measure import Cost
from usp.demo.settings import Settings

if TYPE_CHECKING:
    from rich.table import Table

# The limit, over what one process took for the picture itself: a longer sequence takes more.
ROOM = 1.3
# A step that takes less shows what libraries take.
LEAST = 48 * 2**20


@dataclass(frozen=True)
class Held:
    """Two runs of one sequence in one limit.

    Attributes:
        settings: With the limit.
        small: The picture itself in one process, without one.
        one: What became of one process.
        every: Of each of several.
    """

    settings: Settings
    small: Cost
    one: Cost | OutOfMemory
    every: list[Cost]

    @property
    def limit(self) -> int:
        assert self.settings.limit is not None
        return self.settings.limit

    def told(self) -> dict[str, Any]:
        """For a program."""
        return {
            "limit": self.limit,
            "tokens": self.settings.tokens,
            "one_process": {"out_of_memory": isinstance(self.one, OutOfMemory), **asdict(self.one)},
            "processes": [asdict(cost) for cost in self.every],
        }


def limit_of(small: Cost) -> int:
    """What each process may take for its step, in whole MiB."""
    return round(ROOM * taken(small) / 2**20) * 2**20


def taken(cost: Cost) -> int:
    """By the step, on top of what was there before."""
    return cost.peak_memory - cost.memory_before


def in_mib(size: int | None) -> str:
    return f"{(size or 0) / 2**20:.0f} MiB"


def reason_against(settings: Settings, times: int, small: Cost) -> str:
    """Why this part cannot be shown here; empty where it can."""
    if times == 1:
        return "--times 1"
    if settings.processes < 2 * times:
        return (
            f"{times} times the picture needs {2 * times} processes or more, here are "
            f"{settings.processes}"
        )
    if small.device != "cpu" or not can_limit():
        return "Linux limits the memory of processes that compute on a CPU, not what runs here"
    if taken(small) < LEAST:
        return f"a step of {settings.tokens} tokens takes {in_mib(taken(small))}, too little to see"
    return ""


def memory_table(held: Held) -> Table:
    """A column for each run: tokens, whether it fitted, memory, seconds."""
    from rich.table import Table

    settings, one = held.settings, held.one
    table = Table(title=f"What fits in {in_mib(held.limit)}?", title_justify="left")
    table.add_column("")
    headings = ("1 process", "1 process", f"{settings.processes} processes, each")
    for heading in headings:
        table.add_column(heading, justify="right")
    table.add_row("tokens", str(settings.grid.tokens), *[str(settings.tokens)] * 2)
    table.add_row("limit for the step", "none", *[in_mib(held.limit)] * 2)
    most = max(map(taken, held.every))
    if isinstance(one, OutOfMemory):
        ended, took, seconds = "[bold red]out of memory[/]", "more", f"{one.seconds:.2f}, then not"
    else:
        ended, took, seconds = "finished", in_mib(taken(one)), f"{_seconds(one):.2f}"
    table.add_row("", "finished", ended, "[green]finished[/]")
    table.add_row("memory for the step", in_mib(taken(held.small)), took, in_mib(most))
    longest = max(map(_seconds, held.every))
    table.add_row("seconds", f"{_seconds(held.small):.2f}", seconds, f"{longest:.2f}")
    return table


def memory_in_words(held: Held, compared: list[Difference]) -> str:
    """What was done, openly."""
    settings = held.settings
    worst = max(compared, key=lambda d: d.relative)
    said = (
        f"The sequence is the picture {settings.times} times over, and the demo lets each process "
        f"take {in_mib(held.limit)} for its step (setrlimit, RLIMIT_DATA): {ROOM:g} times what one "
        "took for the picture once. "
    )
    if isinstance(held.one, OutOfMemory):
        said += f"One process ended with: {held.one.said!r}. "
    return said + (
        f"{settings.processes} processes finished. Attention sees every key {settings.times} "
        "times, so each copy must have the output of the picture, and every weight its gradient: "
        f"they agree with torch.nn's of the picture once to {worst.relative:.0e}."
    )


def save_bars(path: Path, held: Held) -> None:
    """Memory of each process for its step, and the limit."""
    from matplotlib.figure import Figure

    tokens, mib = held.settings.tokens, 2**20
    is_out = isinstance(held.one, OutOfMemory)
    one = held.limit if isinstance(held.one, OutOfMemory) else taken(held.one)
    sizes = [taken(held.small), one, *map(taken, held.every)]
    names = [f"1 process\n{held.settings.grid.tokens} tokens", f"1 process\n{tokens} tokens"]
    names += [
        f"{rank + 1} of {len(held.every)}\n{tokens} tokens" for rank in range(len(held.every))
    ]
    colours = ["0.6", "#d55e00" if is_out else "0.6", *["#0072b2"] * len(held.every)]
    figure = Figure(figsize=(1.9 + 1.3 * len(sizes), 4.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(names, [size / mib for size in sizes], color=colours, width=0.7)
    labels = [in_mib(size) for size in sizes]
    if is_out:
        bars[1].set_hatch("//")
        labels[1] = "out of memory"
    axes.bar_label(bars, labels, padding=2)
    axes.axhline(held.limit / mib, color="black", linestyle="--", linewidth=1)
    axes.set_xlim(-0.6, len(sizes) + 0.6)
    axes.text(len(sizes) - 0.5, 1.02 * held.limit / mib, f"limit {in_mib(held.limit)}")
    axes.set_ylabel("MiB for forward and backward")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("The same step, whole and sharded, in the same limit", loc="left", fontsize=11)
    figure.savefig(path, dpi=110)


def _seconds(cost: Cost) -> float:
    return cost.forward_seconds + cost.backward_seconds
