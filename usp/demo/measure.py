"""Time, memory and bytes of one training step in one process."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import usp
from usp.demo.model import PatchTransformer, reconstruction_loss
from usp.demo.settings import Settings
from usp.distributed.processes import Tell
from usp.planning.cost import Place, Shape, bytes_sent
from usp.testing import WireBytes


@dataclass(frozen=True)
class Cost:
    """What one forward and backward took in one process.

    Attributes:
        device: Where it ran.
        threads: torch's threads in this process.
        forward_seconds, backward_seconds: Wall clock.
        peak_memory: Most bytes of memory resident in this process so far (on a GPU: allocated
            on it).
        memory_before: The same before the step: the interpreter, torch, weights and patches.
        forward_bytes, backward_bytes: Sent to other processes, counted on the way.
        forward_bytes_expected, backward_bytes_expected: The same by formula
            (`usp.planning.cost`).
    """

    device: str
    threads: int
    forward_seconds: float
    backward_seconds: float
    peak_memory: int
    memory_before: int
    forward_bytes: int
    backward_bytes: int
    forward_bytes_expected: int = 0
    backward_bytes_expected: int = 0


def measured_step(
    settings: Settings,
    model: PatchTransformer,
    patches: Tensor,
    mesh: usp.SequenceMesh | None,
    tell: Tell,
) -> tuple[Cost, dict[str, Tensor]]:
    """One forward and backward of this rank's tokens, timed and its bytes counted.

    Args:
        settings: Grid, layout and hidden patches.
        model: Gets gradients: of the whole loss on one device, else this rank's partial sums.
        patches: (1, tokens, patch_dim), the whole sequence on every rank.
        mesh: The ranks that share the picture; None is one device.
        tell: Hears of every block that is done, forward and backward.

    Returns:
        The cost, and this rank's tokens of the output and of the gradient of the patches.
    """
    layout, grid = settings.layout, settings.grid
    hidden = settings.hidden().to(patches.device)
    values_hidden = int(hidden.sum()) * grid.patch_dim
    positions = usp.positions(settings.tokens, mesh, layout, device=patches.device)
    x, hidden = (usp.shard_sequence(t, mesh, 1, layout) for t in (patches, hidden))
    x = x.clone().requires_grad_()
    coordinates = grid.coordinates(positions % grid.tokens)[None]
    _tell_blocks(model, tell)
    _together(mesh)
    before = _memory(patches.device)["now"]

    def forward() -> Tensor:
        with settings.autocast(patches.device.type):
            return model(x, coordinates, hidden)

    output, forward_seconds, forward_bytes = _timed(forward, patches.device)
    loss = reconstruction_loss(output, x.detach(), hidden, values_hidden)
    _together(mesh)
    _, backward_seconds, backward_bytes = _timed(loss.backward, patches.device)
    cost = Cost(
        str(patches.device),
        torch.get_num_threads(),
        forward_seconds,
        backward_seconds,
        _memory(patches.device)["peak"],
        before,
        forward_bytes,
        backward_bytes,
        _bytes_expected(settings, mesh, backward=False),
        _bytes_expected(settings, mesh, backward=True),
    )
    assert x.grad is not None
    return cost, {"output": output.detach(), "gradient of the patches": x.grad}


def _bytes_expected(settings: Settings, mesh: usp.SequenceMesh | None, backward: bool) -> int:
    """What attention must send from this rank, all layers together."""
    if mesh is None:
        return 0
    heads, head_dim = settings.num_heads, settings.embed_dim // settings.num_heads
    tokens = settings.tokens
    shape = Shape(1, tokens, tokens, heads, heads, head_dim, head_dim, settings.attention_dtype)
    place = Place(
        mesh.ring_degree, mesh.ulysses_degree, mesh.ring_rank, mesh.ulysses_rank, settings.layout
    )
    return settings.depth * bytes_sent(shape, place, backward).total


def memory_source(device: str) -> str:
    """Where the figures of memory come from, in words."""
    if device != "cpu":
        return "torch.cuda.max_memory_allocated"
    if platform.system() == "Linux":
        return "VmHWM of /proc/self/status"
    return "ru_maxrss of getrusage"


def _memory(device: torch.device) -> dict[str, int]:
    """Bytes in use by this process, now and at its peak.

    Not `ru_maxrss` on Linux: a fresh process inherits that of the one which started it.
    """
    if device.type != "cpu":
        return {
            "now": torch.cuda.memory_allocated(device),
            "peak": torch.cuda.max_memory_allocated(device),
        }
    if platform.system() == "Linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
        return {"now": 1024 * int(kib["VmRSS"]), "peak": 1024 * int(kib["VmHWM"])}
    # Bytes on macOS, KiB elsewhere.
    unit = 1 if platform.system() == "Darwin" else 1024
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"now": peak, "peak": peak}


def _together(mesh: usp.SequenceMesh | None) -> None:
    """Wait for the other ranks, so that a clock starts when all can run."""
    if mesh is not None:
        mesh.gather_objects(None)


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float, int]:
    """What `work()` returns, its seconds, and the bytes it sent to other ranks."""
    start = time.perf_counter()
    with WireBytes() as wire:
        result = work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
    return result, time.perf_counter() - start, wire.sent


def _tell_blocks(model: PatchTransformer, tell: Tell) -> None:
    total, done = 2 * len(model.blocks), 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        tell(done, total)

    def after_forward(_module: Any, _args: Any, output: Tensor) -> None:
        count()
        # Runs when backward reaches this block.
        output.register_hook(count)

    for block in model.blocks:
        block.register_forward_hook(after_forward)
