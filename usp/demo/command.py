"""The course of the demo: train, run plain, run sharded, compare, report."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from usp.demo import work
from usp.demo.attention_map import query_patches
from usp.demo.compare import Difference, differences, of_copies
from usp.demo.held import (
    Held,
    in_mib,
    limit_of,
    memory_in_words,
    memory_table,
    reason_against,
    save_bars,
)
from usp.demo.image import choose_grid, load_photograph
from usp.demo.measure import Cost
from usp.demo.settings import TOLERANCES, Settings
from usp.distributed.processes import Tell, run

if TYPE_CHECKING:
    from rich.progress import Progress

LAYOUTS = ("contiguous", "zigzag", "striped")
Stage = Callable[..., Any]


class Refused(ValueError):
    """The demo cannot start; says what to change."""


@dataclass(frozen=True)
class Findings:
    """What the demo found.

    Attributes:
        told: All of it, for a program.
        wrong: What differs by more than is allowed; empty where nothing does.
    """

    told: dict[str, Any]
    wrong: str


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the demo's options."""
    parser.add_argument("--ulysses", type=int, default=2, help="Ulysses degree (default 2)")
    parser.add_argument("--ring", type=int, default=2, help="ring degree (default 2)")
    parser.add_argument(
        "--tokens", type=int, default=9216, help="at least so many patches (default 9216)"
    )
    parser.add_argument("--layout", default="contiguous", choices=LAYOUTS)
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=sorted(TOLERANCES),
        help="default float32; bfloat16 is autocast over float32 weights",
    )
    parser.add_argument(
        "--train-steps",
        type=int,
        default=120,
        help="before the comparison, on small windows of the picture (default 120)",
    )
    parser.add_argument(
        "--times",
        type=int,
        default=2,
        help="then the picture so many times over, in a limit of memory that one process cannot "
        "hold it in (default 2; 1: without this part)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("usp_demo.png"), help="the picture (default usp_demo.png)"
    )


def run_demo(arguments: argparse.Namespace, to_stderr: bool = False) -> Findings:
    """Train, run plain, run sharded, compare, and say it as it comes.

    Args:
        arguments: Of ``add_options``.
        to_stderr: Where to say it; else on stdout.

    Raises:
        Refused: it cannot start.
        ProcessFailed: one of its processes raised, died or did not answer.
    """
    missing = [m for m in ("skimage", "matplotlib", "rich") if find_spec(m) is None]
    if missing:
        raise Refused(f"the demo needs {', '.join(missing)}: pip install 'usp[demo]'")
    for name, least in (
        ("ulysses", 1),
        ("ring", 1),
        ("tokens", 1),
        ("train_steps", 0),
        ("times", 1),
    ):
        value = getattr(arguments, name)
        if value < least:
            raise Refused(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
    _check_pictures(arguments.out)
    height, width, _ = load_photograph().shape
    try:
        grid = choose_grid(height, width, arguments.tokens)
    except ValueError as error:
        raise Refused(str(error)) from error
    with tempfile.TemporaryDirectory(prefix="usp-demo-") as folder:
        settings = Settings(
            grid=grid,
            folder=folder,
            ulysses_degree=arguments.ulysses,
            ring_degree=arguments.ring,
            layout=arguments.layout,
            dtype_name=arguments.dtype,
            train_steps=arguments.train_steps,
        )
        return _demo(settings, arguments.times, arguments.out, to_stderr)


def _check_pictures(out: Path) -> None:
    """Refuse what could not be written, minutes before it is.

    Raises:
        Refused: says why.
    """
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if out.suffix.removeprefix(".") not in known:
        raise Refused(f"--out must end in .{', .'.join(sorted(known))}, got {out}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise Refused(f"--out: {error}") from error


def _demo(settings: Settings, times: int, out: Path, to_stderr: bool) -> Findings:
    from rich.console import Console

    from usp.demo.report import cost_table, difference_table, in_words, save_picture

    start = time.monotonic()
    console = Console(stderr=to_stderr)
    console.print(_introduction(settings))
    with _progress(console) as stage:
        stage("train the weights", work.train_model, settings, 1)
        (plain_cost,) = stage("plain step, 1 process", work.plain_step, settings, 1)
        (alone_cost,) = stage("usp's step, 1 process", work.alone_step, settings, 1)
        name = f"sharded step, {settings.processes} processes"
        sharded_costs = stage(name, work.sharded_step, settings, settings.processes)
        why_not = reason_against(settings, times, alone_cost)
        held = None if why_not else _held(settings, times, alone_cost, stage)
    plain, sharded = (torch.load(settings.file(f)) for f in (work.PLAIN, work.SHARDED))
    attention = sharded.pop("attention")
    compared = differences(sharded, plain)
    queries = query_patches(torch.load(settings.file(work.PATCHES)))
    save_picture(out, load_photograph(), settings.grid, attention, queries)
    console.print(difference_table(settings, compared))
    console.print(cost_table(settings, plain_cost, alone_cost, sharded_costs))
    console.print(in_words(settings, plain_cost, alone_cost, sharded_costs))
    told: dict[str, Any] = {
        "tokens": settings.grid.tokens,
        "tolerance": settings.tolerance,
        "differences": _told(compared),
        "plain": asdict(plain_cost),
        "alone": asdict(alone_cost),
        "sharded": [asdict(cost) for cost in sharded_costs],
        "picture": out,
    }
    if held is None:
        console.print(f"Without the part on memory: {why_not}.")
        told["memory"] = {"left_out": why_not}
    else:
        long = torch.load(held.settings.file(work.LONG))
        compared += (more := differences(long, of_copies(plain, times)))
        console.print(memory_table(held))
        console.print(memory_in_words(held, more))
        bars = out.with_stem(f"{out.stem}_memory")
        save_bars(bars, held)
        told["memory"] = {**held.told(), "differences": _told(more), "picture": bars}
        console.print(f"picture: {bars}", highlight=False)
    told["seconds"] = time.monotonic() - start
    console.print(f"picture: {out}   ({told['seconds']:.0f} s in all)", highlight=False)
    return Findings(told, _wrong(settings, compared))


def _held(settings: Settings, times: int, alone: Cost, stage: Stage) -> Held:
    """The same sequence in the same limit, by one process and by all."""
    settings = replace(settings, times=times, limit=limit_of(alone))
    told = f"{settings.tokens} tokens in {in_mib(settings.limit)}"
    (one,) = stage(f"{told}, 1 process", work.alone_step, settings, 1)
    every = stage(f"{told}, {settings.processes}", work.sharded_step, settings, settings.processes)
    return Held(settings, alone, one, every)


def _told(compared: list[Difference]) -> list[dict[str, Any]]:
    return [{**asdict(d), "relative": d.relative} for d in compared]


def _wrong(settings: Settings, compared: list[Difference]) -> str:
    worst = max(compared, key=lambda d: d.relative)
    if worst.relative <= settings.tolerance:
        return ""
    return (
        f"{worst.name} differs by {worst.relative:.1e} of its largest value, "
        f"more than the {settings.tolerance:.0e} allowed in {settings.dtype_name}"
    )


def _introduction(settings: Settings) -> str:
    grid = settings.grid
    return (
        f"Hubble eXtreme Deep Field, {grid.rows} x {grid.columns} = {grid.tokens} patches of "
        f"{grid.patch_size} x {grid.patch_size} pixels, in {settings.processes} pieces "
        f"({settings.layout}); {settings.depth} layers of {settings.num_heads} heads, "
        f"{settings.embed_dim} features, {settings.dtype_name}"
    )


@contextmanager
def _progress(console: Any) -> Iterator[Stage]:
    """`stage(title, work, settings, processes)` runs a stage of the demo and shows its progress."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    title = TextColumn("{task.description:36}")
    columns = (SpinnerColumn(), title, BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def stage(title: str, function: Callable[..., Any], settings: Settings, count: int) -> Any:
            task = progress.add_task(title, total=None)
            if not console.is_terminal:
                console.print(f"{title} ...")
            results = run(function, settings, count, _teller(progress, task))
            progress.update(task, total=1, completed=1)
            return results

        yield stage


def _teller(progress: Progress, task: Any) -> Tell:
    def tell(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)

    return tell
