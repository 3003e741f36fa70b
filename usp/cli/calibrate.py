"""``usp plan --calibrate``: what this machine computes and sends, for the planner."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from usp.attention.functional import long_context_attention
from usp.cli.console import NoAnswer, UserError, present, table
from usp.distributed.comm import Axis, join_locally
from usp.distributed.making import init_mesh
from usp.distributed.processes import ProcessFailed, Tell
from usp.distributed.processes import run as run_processes
from usp.machine.cpu import model as cpu_model
from usp.planning.choose import here
from usp.planning.choose.time import CALLS

_MOST_PROCESSES = 4
# Of a layer whose rates stand for others: small enough for seconds, large enough for full rates.
_TOKENS, _HIDDEN, _HEADS, _MLP = 1024, 512, 8, 2048
_SMALL, _LARGE = 2**14, 2**23  # bytes of messages
_REPEATS = 9
_SOME = 20  # calls of what is short


def run(arguments: argparse.Namespace) -> int:
    """Measure, keep and say it.

    Raises:
        UserError: it cannot be kept, the number of processes is below 2, or the file is none of
            ``usp bench comm``.
        NoAnswer: a process died.
    """
    links: dict[str, float] = {}
    processes = arguments.devices or min(_MOST_PROCESSES, max(2, os.cpu_count() or 2))
    if arguments.calibrate:
        processes, links = links_of(Path(arguments.calibrate))
        if arguments.devices not in (None, processes):
            raise UserError(
                f"--devices {arguments.devices}, but {arguments.calibrate} was measured with "
                f"{processes} processes"
            )
    if processes < 2:
        raise UserError(f"--calibrate measures links: --devices must be 2 or more, got {processes}")
    found = measure(processes)
    found["levels"][0] |= links
    try:
        here.keep(found)
    except OSError as error:
        raise UserError(f"--calibrate cannot keep what it measured: {error}") from error
    present(arguments, {"cluster": found, "kept": str(here.file())}, lambda: _text(found))
    return 0


def links_of(path: Path) -> tuple[int, dict[str, float]]:
    """Processes, and numbers of a ``Link``, by the lines that ``usp bench comm`` drew.

    Raises:
        UserError: there is no such file, or another one.
    """
    try:
        records = [json.loads(line) for line in path.read_text().splitlines() if line]
        processes = int(records[0]["arguments"]["processes"])
        fits = {r["candidate"]: r["values"] for r in records if r.get("what") == "fit"}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no result of usp bench comm --json: {error!r}") from error
    found: dict[str, float] = {}
    for verb, rate, latency, ranks in (
        ("shift", "flow", "hop", 1),
        ("all_gather", "rate", "latency", processes - 1),
        ("all_to_all", "all_to_all", None, 1),
        ("all_reduce", "all_reduce", None, 1),
    ):
        values = fits.get(verb, {})
        if values.get("bytes_per_s"):  # a line that does not rise has none
            found[rate] = values["bytes_per_s"]
            if latency is not None:
                found[latency] = values["latency_s"] / ranks
    if not found:
        raise UserError(f"{path} has no line through several sizes of a message")
    return processes, found


def _text(found: dict[str, Any]) -> str:
    link = found["levels"][0]
    rows = [
        ("matrix products", f"{found['peak']['fp32'] * found['matrix_share'] / 1e9:.4g} GFLOP/s"),
        ("attention", f"{found['peak']['fp32'] * found['attention_share'] / 1e9:.4g} GFLOP/s"),
        ("passes over memory", f"{found['memory_rate'] / 1e9:.3g} GB/s"),
        ("optimizer", f"{found['update_rate'] / 1e9:.3g} GB/s of states"),
        ("a kernel's call", f"{found['launch'] * 1e6:.3g} us"),
        ("a call of attention", f"{found['call'] * 1e6:.3g} us"),
        ("a collective", f"{link['latency'] * 1e6:.3g} us a rank, {link['rate'] / 1e9:.3g} GB/s"),
        ("to a neighbour", f"{link['hop'] * 1e6:.3g} us, {link['flow'] / 1e9:.3g} GB/s"),
        ("all to all", f"{link['all_to_all'] / 1e9:.3g} GB/s"),
        ("all-reduce", f"{link['all_reduce'] / 1e9:.3g} GB/s"),
    ]
    return f"{found['source']}; kept in {here.file()}\n{table(rows)}"


def measure(processes: int) -> dict[str, Any]:
    """The arguments of ``Cluster`` for so many processes of this machine, all busy at once; of a
    single one without links.

    Raises:
        NoAnswer: one of them died.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        try:
            each = run_processes(_measured, (store, processes), processes, _silent, 300.0)
        except ProcessFailed as error:
            raise NoAnswer(str(error)) from error
    slowest = {name: max(one[name] for one in each) for name in each[0]}
    return _as_cluster(slowest, processes)


def _silent(done: int, total: int) -> None:
    pass


def _as_cluster(seconds: dict[str, float], processes: int) -> dict[str, Any]:
    """Rates out of times. Those of a small message and a large one give latency and rate."""
    weights = 4 * _HIDDEN**2 + 2 * _HIDDEN * _MLP
    products = 6 * weights * _TOKENS
    matrix = products / seconds["products"]
    launch = seconds["small layer"] / CALLS[True]
    call = max(0.0, seconds["small attention"] / 2 - 3 * launch)  # a forward's and a backward's
    busy = seconds["attention"] - seconds["small attention"]
    attention = 14 * float(_TOKENS) ** 2 * _HIDDEN / max(busy, 0.1 * seconds["attention"])
    traffic = 5 * 4 * _TOKENS * (8 * _HIDDEN + 2 * _MLP)
    rest = seconds["layer"] - seconds["products"] - seconds["small layer"]
    rest = max(rest, 0.02 * seconds["layer"])
    link = _as_link(seconds, processes) if processes > 1 else {"ranks": 0, "rate": 1, "latency": 0}
    peak = max(matrix, attention)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
    return {
        "name": here.NAME,
        "node": processes,
        "peak": {"fp32": peak},
        "memory": memory,
        "memory_rate": traffic / rest,
        "levels": [link],
        "matrix_share": matrix / peak,
        "attention_share": attention / peak,
        "launch": launch,
        "call": call,
        "update_rate": 2 * 16 * weights / seconds["optimizer"],
        "host": 0,  # it is the device
        "contention": 1.0,
        "source": f"measured on {cpu_model()}, {processes} processes at once",
    }


def _as_link(seconds: dict[str, float], processes: int) -> dict[str, float]:
    others, links = processes - 1, {}
    for name in ("gather", "hop", "all_to_all", "all_reduce"):
        large, small = seconds[f"{name} large"], seconds[f"{name} small"]
        moved = _LARGE - _SMALL
        links[name] = (moved / max(large - small, 1e-9), small)
    share = others / processes
    return {
        "ranks": 0,
        "rate": links["gather"][0] * share,
        "latency": links["gather"][1] / others,
        "flow": links["hop"][0],
        "hop": links["hop"][1],
        "all_to_all": links["all_to_all"][0] * share,
        "all_reduce": 2 * links["all_reduce"][0] * share,
    }


def _measured(settings: tuple[str, int], rank: int, tell: Tell) -> dict[str, float]:
    """Seconds of each thing, on one of the processes."""
    store, processes = settings
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    join_locally(store, rank, processes, 120.0)
    axis = init_mesh(processes, 1, device_type="cpu").ulysses
    return {**_computing(axis), **(_sending(axis) if processes > 1 else {})}


def _take_turns(axis: Axis, calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each, ascending: all in turn, so that a disturbance meets none alone, and each
    begun by all ranks at once."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(_REPEATS + 1):
        for name, call in calls.items():
            axis.all_reduce(torch.zeros(1))
            start = time.perf_counter()
            call()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - start)
    return {name: sorted(some) for name, some in times.items()}


class _Layer(nn.Module):
    """A layer without its attention."""

    def __init__(self, hidden: int, mlp: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.q, self.k, self.v, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, mlp), nn.Linear(mlp, hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.out(self.q(y) + self.k(y) + self.v(y))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


def _computing(axis: Axis) -> dict[str, float]:
    """Products, a layer, attention, and what a call costs."""
    torch.manual_seed(0)
    x = torch.randn(_TOKENS, _HIDDEN)
    inner = torch.randn(_TOKENS, _MLP)
    layer, thin = _Layer(_HIDDEN, _MLP), _Layer(64, 128)
    matrices = [one.weight for one in layer.modules() if isinstance(one, nn.Linear)]

    def products() -> None:
        with torch.no_grad():
            for weight in matrices:
                operand = x if weight.shape[1] == _HIDDEN else inner
                out = operand @ weight.T
                out @ weight
                out.T @ operand

    heads = torch.randn(1, _TOKENS, _HEADS, _HIDDEN // _HEADS, requires_grad=True)
    few, narrow = heads[:, :8].detach().requires_grad_(), x[:8, :64].clone().requires_grad_()
    optimizer = torch.optim.AdamW(layer.parameters(), foreach=False)
    layer(x).sum().backward()

    def attend(q: Tensor) -> None:
        out = long_context_attention(q, q, q)
        assert isinstance(out, Tensor)
        out.sum().backward()

    def often(call: Callable[[], object]) -> Callable[[], None]:
        def some() -> None:
            for _ in range(_SOME):
                call()

        return some

    found = _take_turns(
        axis,
        {
            "products": products,
            "layer": lambda: layer(x.requires_grad_()).sum().backward(),
            "small layer": often(lambda: thin(narrow).sum().backward()),
            "attention": lambda: attend(heads),
            "small attention": often(lambda: attend(few)),
            "optimizer": optimizer.step,
        },
    )
    least = {name: times[0] for name, times in found.items()}  # others only add
    return least | {name: least[name] / _SOME for name in least if name.startswith("small")}


def _sending(axis: Axis) -> dict[str, float]:
    """A gather to, a hop of and an all-to-all of so many bytes, and their all-reduce."""
    calls: dict[str, Callable[[], object]] = {}
    for name, size in (("small", _SMALL), ("large", _LARGE)):
        piece = size // 4 // axis.size
        sizes = [piece] * axis.size
        own, message = torch.zeros(piece), torch.zeros(piece * axis.size)
        whole = torch.zeros(piece * axis.size)
        calls |= {
            f"gather {name}": partial(_waited, axis.all_gather, own, whole, sizes),
            f"hop {name}": partial(_waited, axis.shift, message, whole),
            f"all_to_all {name}": partial(axis.all_to_all, message, sizes, sizes),
            f"all_reduce {name}": partial(axis.all_reduce, message),
        }
    return {name: times[_REPEATS // 2] for name, times in _take_turns(axis, calls).items()}


def _waited(verb: Callable[..., Callable[[], object]], *args: object) -> None:
    verb(*args)()
