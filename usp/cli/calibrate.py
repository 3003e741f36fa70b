"""``usp plan --calibrate``: what this machine computes and sends, for the planner."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from usp.attention.functional import long_context_attention
from usp.cli.console import NoAnswer, UserError, present, table
from usp.distributed.comm import Axis, join_locally
from usp.distributed.mesh import init_mesh
from usp.distributed.processes import ProcessFailed, Tell
from usp.distributed.processes import run as run_processes
from usp.machine.cpu import model as cpu_model
from usp.planning.choose import here

_MOST_PROCESSES = 4
# Of a layer whose rates stand for others: small enough for seconds, large enough for full rates.
_TOKENS, _HIDDEN, _HEADS, _MLP = 1024, 512, 8, 2048
_SMALL, _LARGE = 2**14, 2**23  # bytes of messages
_REPEATS = 5


def run(arguments: argparse.Namespace) -> int:
    """Measure, keep and say it.

    Raises:
        UserError: it cannot be kept, or the number of processes is below 2.
        NoAnswer: a process died.
    """
    processes = arguments.devices or min(_MOST_PROCESSES, max(2, os.cpu_count() or 2))
    if processes < 2:
        raise UserError(f"--calibrate measures links: --devices must be 2 or more, got {processes}")
    found = measure(processes)
    try:
        here.keep(found)
    except OSError as error:
        raise UserError(f"--calibrate cannot keep what it measured: {error}") from error
    present(arguments, {"cluster": found, "kept": str(here.file())}, lambda: _text(found))
    return 0


def _text(found: dict[str, Any]) -> str:
    link = found["levels"][0]
    rows = [
        ("matrix products", f"{found['peak']['fp32'] * found['matrix_share'] / 1e9:.4g} GFLOP/s"),
        ("attention", f"{found['peak']['fp32'] * found['attention_share'] / 1e9:.4g} GFLOP/s"),
        ("passes over memory", f"{found['memory_rate'] / 1e9:.3g} GB/s"),
        ("a kernel's call", f"{found['launch'] * 1e6:.3g} us"),
        ("a collective", f"{link['latency'] * 1e6:.3g} us a rank, {link['rate'] / 1e9:.3g} GB/s"),
        ("to a neighbour", f"{link['hop'] * 1e6:.3g} us, {link['flow'] / 1e9:.3g} GB/s"),
        ("all to all", f"{link['all_to_all'] / 1e9:.3g} GB/s"),
    ]
    return f"{found['source']}; kept in {here.file()}\n{table(rows)}"


def measure(processes: int) -> dict[str, Any]:
    """The arguments of ``Cluster`` for so many processes of this machine, all busy at once.

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
    others = processes - 1
    weights = 4 * _HIDDEN**2 + 2 * _HIDDEN * _MLP
    products = 6 * weights * _TOKENS
    matrix = products / seconds["products"]
    pairs = float(_TOKENS) ** 2
    attention = 14 * pairs * _HIDDEN / seconds["attention"]
    traffic = 5 * 4 * _TOKENS * (8 * _HIDDEN + 2 * _MLP)
    rest = max(seconds["layer"] - seconds["products"], 0.02 * seconds["layer"])
    links = {}
    for name in ("gather", "hop", "all_to_all"):
        large, small = seconds[f"{name} large"], seconds[f"{name} small"]
        moved = _LARGE - _SMALL
        links[name] = (moved / max(large - small, 1e-9), small)
    peak = max(matrix, attention)
    share = others / processes
    link = {
        "ranks": 0,
        "rate": links["gather"][0] * share,
        "latency": links["gather"][1] / others,
        "flow": links["hop"][0],
        "hop": links["hop"][1],
        "all_to_all": links["all_to_all"][0] * share,
    }
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
        "launch": seconds["launch"],
        "host": 0,  # it is the device
        "contention": 1.0,
        "source": f"measured on {cpu_model()}, {processes} processes at once",
    }


def _measured(settings: tuple[str, int], rank: int, tell: Tell) -> dict[str, float]:
    """Seconds of each thing, on one of the processes."""
    store, processes = settings
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    join_locally(store, rank, processes, 120.0)
    axis = init_mesh(processes, 1, device_type="cpu").ulysses
    return {**_computing(axis), **_sending(axis)}


def _clock(axis: Axis, call: Callable[[], object]) -> float:
    """The median of a few, each begun by all ranks at once."""
    call()
    times = []
    for _ in range(_REPEATS):
        axis.all_reduce(torch.zeros(1))
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[_REPEATS // 2]


class _Layer(nn.Module):
    """A layer without its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(_HIDDEN) for _ in range(2))
        self.qkv, self.out = nn.Linear(_HIDDEN, 3 * _HIDDEN), nn.Linear(_HIDDEN, _HIDDEN)
        self.up, self.down = nn.Linear(_HIDDEN, _MLP), nn.Linear(_MLP, _HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.qkv(self.norms[0](x))[..., :_HIDDEN])
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norms[1](x))))
        return x


def _computing(axis: Axis) -> dict[str, float]:
    """Products, a layer, attention, and what a call costs."""
    torch.manual_seed(0)
    x = torch.randn(_TOKENS, _HIDDEN)
    inner = torch.randn(_TOKENS, _MLP)
    layer = _Layer()
    matrices = [layer.qkv.weight, layer.out.weight, layer.up.weight, layer.down.weight]

    def products() -> None:
        with torch.no_grad():
            for weight in matrices:
                operand = x if weight.shape[1] == _HIDDEN else inner
                out = operand @ weight.T
                out @ weight
                out.T @ operand

    def whole() -> None:
        layer(x.requires_grad_()).sum().backward()

    heads = torch.randn(1, _TOKENS, _HEADS, _HIDDEN // _HEADS, requires_grad=True)
    few = heads[:, :8].detach().requires_grad_()
    calls = 20

    def attend(q: Tensor) -> None:
        out = long_context_attention(q, q, q)
        assert isinstance(out, Tensor)
        out.sum().backward()

    def attend_often() -> None:
        for _ in range(calls):
            attend(few)

    small = _clock(axis, attend_often) / calls
    return {
        "products": _clock(axis, products),
        "layer": _clock(axis, whole),
        "attention": _clock(axis, lambda: attend(heads)),
        "launch": small / 6,  # three kernels a pass, in the words of choose/attention.py
    }


def _sending(axis: Axis) -> dict[str, float]:
    """A gather to, a hop of and an all-to-all of so many bytes."""
    found = {}
    for name, size in (("small", _SMALL), ("large", _LARGE)):
        piece = size // 4 // axis.size
        sizes = [piece] * axis.size
        own = torch.zeros(piece)
        message, whole = torch.zeros(piece * axis.size), torch.zeros(piece * axis.size)
        sends: dict[str, Callable[[], object]] = {
            "gather": lambda o=own, w=whole, s=sizes: axis.all_gather(o, w, s)(),  # type: ignore[misc]
            "hop": lambda m=message, w=whole: axis.shift(m, w)(),  # type: ignore[misc]
            "all_to_all": lambda m=message, s=sizes: axis.all_to_all(m, s, s),  # type: ignore[misc]
        }
        for what, send in sends.items():
            found[f"{what} {name}"] = _clock(axis, send)
    return found
