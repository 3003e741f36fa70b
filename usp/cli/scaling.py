"""Weak and strong scaling as the planner predicts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from usp.cli.console import UserError, table
from usp.cli.layouts import name_of
from usp.planning.choose.job import Job
from usp.planning.choose.search import Predicted

KINDS = {"strong": "the same batch", "weak": "a batch that grows with the devices"}


@dataclass(frozen=True)
class Point:
    """A number of devices.

    Attributes:
        devices, batch: Of the job.
        best: The fastest choice; None where nothing fits.
        efficiency: Throughput a device, of that with the fewest devices that it fits; 0 if none.
    """

    devices: int
    batch: int
    best: Predicted | None
    efficiency: float


Curves = Mapping[str, Sequence[Point]]


def scaling_of(job: Job, most: int, best: Callable[[Job], Predicted]) -> Curves:
    """From the job's devices on, doubling.

    Args:
        best: The choice for one job.

    Raises:
        ValueError: the job fits none of them.
    """
    counts = [job.devices]
    while 2 * counts[-1] <= most:
        counts.append(2 * counts[-1])
    curves = {}
    for kind in KINDS:
        points: list[Point] = []
        first = None
        for devices in counts:
            times = devices // job.devices if kind == "weak" else 1
            one = _best(replace(job, devices=devices, batch=job.batch * times), best)
            a_device = 0.0 if one is None else one.tokens_a_second / devices
            first = first or a_device
            efficiency = a_device / first if first else 0.0
            points.append(Point(devices, job.batch * times, one, efficiency))
        curves[kind] = points
    if all(point.best is None for points in curves.values() for point in points):
        best(replace(job, devices=counts[-1]))  # says what it lacks
    return curves


def _best(job: Job, best: Callable[[Job], Predicted]) -> Predicted | None:
    try:
        return best(job)
    except ValueError:
        return None


def scaling_table(job: Job, curves: Curves) -> str:
    """For a terminal, with bars."""
    parts = [f"{job.model.name}, {job.seq_len} tokens, {job.cluster.name}: predicted scaling"]
    for kind, points in curves.items():
        rows: list[tuple[object, ...]] = [
            ("devices", "batch", "s a step", "tokens/s", "efficiency", "", "best mesh")
        ]
        for point in points:
            if point.best is None:
                rows.append((point.devices, point.batch, "-", "-", "-", "", "nothing fits"))
                continue
            choice, share = point.best.choice, point.efficiency
            mesh = f"dp {choice.dp} ring {choice.ring} ulysses {choice.ulysses} tp {choice.tp} "
            mesh += f"pp {choice.pp} fsdp {choice.fsdp} {name_of(choice.layout)} {choice.transport}"
            numbers = f"{point.best.time.total:.4g}", f"{point.best.tokens_a_second:.4g}"
            bar = "#" * round(20 * share)
            rows.append((point.devices, point.batch, *numbers, f"{100 * share:.1f}%", bar, mesh))
        parts.append(f"{kind}: {KINDS[kind]}\n{table(rows)}")
    return "\n\n".join(parts)


def draw_scaling(job: Job, curves: Curves, path: Path) -> None:
    """Throughput and efficiency against devices as a PNG.

    Raises:
        UserError: matplotlib is not there, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--png needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(9, 4), layout="constrained")
    speed, share = figure.subplots(1, 2)
    for kind, points in curves.items():
        there = [point for point in points if point.best is not None]
        devices = [point.devices for point in there]
        label = f"{kind}: {KINDS[kind]}"
        rates = [point.best.tokens_a_second for point in there if point.best is not None]
        speed.plot(devices, rates, marker="o", label=label)
        share.plot(devices, [100 * point.efficiency for point in there], marker="o", label=label)
    for axes, name in ((speed, "tokens/s"), (share, "efficiency, %")):
        axes.set_xscale("log", base=2)
        counts = [point.devices for points in curves.values() for point in points]
        axes.set_xticks(counts, labels=map(str, counts))
        axes.set_xlabel("devices")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    speed.set_yscale("log")
    share.set_ylim(0, 105)
    speed.legend(fontsize=8)
    figure.suptitle(
        f"predicted: {job.model.name}, {job.seq_len} tokens, {job.cluster.name}", fontsize=10
    )
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise UserError(f"--png: {error}") from error
