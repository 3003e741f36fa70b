"""The checks of ``usp doctor``: right numbers from every backend, verb, mesh and transport."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import usp
from usp.backends import TABLE
from usp.distributed.comm import Axis
from usp.distributed.mesh import SequenceMesh
from usp.testing import dense_attention

# Of the largest value. Some kernels round fp32 to fewer bits in their products.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
TRANSPORTS = ("ring", "direct", "allgather")


class Wrong(Exception):
    """Numbers are not what they must be; says how far off."""


class LeftOut(Exception):
    """It cannot be checked here; says why."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: Its first word says what kind it is.
        run: Returns what to say where all is right.
        is_alone: Whether the rank needs no other for it.
    """

    name: str
    run: Callable[[], str]
    is_alone: bool = False


def checks(mesh_of: Callable[[int, int], SequenceMesh], here: torch.device) -> Iterator[Check]:
    """Every check of a rank, in the order in which all ranks must take them.

    Args:
        mesh_of: Makes the mesh of those degrees (Ulysses, ring), with all ranks together.
        here: Where this rank computes.
    """
    yield from backend_checks(here)
    whole = mesh_of(1, 0)
    if whole.size == 1:
        return
    yield Check("messages", lambda: messages(whole.ring, here))
    for ulysses, ring in degrees(whole.size):
        mesh = whole if ulysses == 1 else mesh_of(ulysses, ring)
        for transport in TRANSPORTS if ring > 1 else ("ring",):
            name = f"attention, {ulysses} ulysses x {ring} ring"
            name += f", {transport}" if ring > 1 else ""
            yield Check(name, partial(sharded, mesh, transport, here))


def backend_checks(here: torch.device) -> Iterator[Check]:
    """Each family that can run here, alone, on the CPU and on this rank's GPU."""
    for device in dict.fromkeys((torch.device("cpu"), here)):
        for backend in TABLE:
            reason = backend.unavailable()
            if reason is None:
                name = f"backend {backend.NAME} on {device.type}"
                yield Check(name, partial(alone, backend.NAME, device), is_alone=True)


def degrees(size: int) -> list[tuple[int, int]]:
    """Ring alone, Ulysses alone, and both where the number allows."""
    both = [(u, size // u) for u in range(2, size) if size % u == 0][:1]
    return [(1, size), *both, (size, 1)]


def alone(backend: str, device: torch.device) -> str:
    """Attention by one backend on one device, forward and backward, in each dtype it takes."""
    said, refused = [], []
    for dtype in ALLOWED:
        problem = Problem.drawn(67, 4, device, dtype)
        try:
            out = attention(problem.inputs, None, backend=backend)
        except NotImplementedError as error:
            if "was checked on this machine" in str(error):  # usp itself has left it out
                raise Wrong(str(error)) from error
            refused.append(str(error))
            continue
        out.backward(problem.cotangent)
        said.append(problem.compared([out.detach(), *gradients(problem.inputs)], dtype))
    if not said:
        raise LeftOut(refused[0])
    return ", ".join(said)


def sharded(mesh: SequenceMesh, transport: str, device: torch.device) -> str:
    """Attention over all ranks, its parts joined, against the whole."""
    dtype, length = torch.float32, 8 * mesh.size + 3
    whole = Problem.drawn(length, 2 * mesh.ulysses_degree, device, dtype)

    def cut(x: Tensor) -> Tensor:
        return usp.shard_sequence(x.detach(), mesh, 1, "zigzag")

    local = [cut(x).requires_grad_() for x in whole.inputs]
    out = attention(local, mesh, layout="zigzag", seq_len=length, transport=transport)
    out.backward(cut(whole.cotangent))
    parts = [out.detach(), *gradients(local)]
    joined = [usp.unshard_sequence(x, mesh, 1, "zigzag", length) for x in parts]
    return whole.compared(joined, dtype)


def attention(inputs: Sequence[Tensor], mesh: SequenceMesh | None, **options: Any) -> Tensor:
    """Of q, k, v, causal."""
    q, k, v = inputs
    out = usp.long_context_attention(q, k, v, mesh, causal=True, **options)
    assert isinstance(out, Tensor)
    return out


def gradients(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Of each."""
    return [x.grad for x in inputs if x.grad is not None]


@dataclass(frozen=True)
class Problem:
    """Whole attention, the same on every rank, and what must come of it.

    Attributes:
        inputs: q, k, v that want gradients; two query heads share a key head.
        cotangent: Of out.
        expected: out, dq, dk, dv in fp64, by the oracle.
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    cotangent: Tensor
    expected: list[Tensor]

    @staticmethod
    def drawn(length: int, heads: int, device: torch.device, dtype: torch.dtype) -> Problem:
        """Causal attention over an odd number of tokens."""
        generator = torch.Generator("cpu").manual_seed(length)
        shapes = [(1, length, n, 32) for n in (heads, heads // 2, heads // 2, heads)]
        drawn = [
            torch.randn(s, generator=generator, device="cpu", dtype=torch.float32).to(dtype)
            for s in shapes
        ]
        exact = [x.double().requires_grad_() for x in drawn[:3]]
        out, _ = dense_attention(exact[0], exact[1], exact[2], causal=True)
        out.backward(drawn[3].double())
        q, k, v = (x.to(device).requires_grad_() for x in drawn[:3])
        return Problem((q, k, v), drawn[3].to(device), [out.detach(), *gradients(exact)])

    def compared(self, found: list[Tensor], dtype: torch.dtype) -> str:
        """How far off the worst is of out, dq, dk, dv.

        Raises:
            Wrong: further than is allowed; names the tensor and both numbers.
        """
        name_of = str(dtype).removeprefix("torch.")
        errors = {}
        for name, x, expected in zip(("out", "dq", "dk", "dv"), found, self.expected, strict=True):
            gap = (x.double().cpu() - expected).abs().max() / expected.abs().max()
            errors[name] = float(gap)
        bad = {name: e for name, e in errors.items() if not e <= ALLOWED[dtype]}
        if bad:
            name = next(iter(bad))
            raise Wrong(
                f"{name} of {name_of} is off by {bad[name]:.1e} of its largest value, allowed are "
                f"{ALLOWED[dtype]:.0e}"
            )
        return f"{name_of} within {max(errors.values()):.0e}"


def messages(axis: Axis, device: torch.device) -> str:
    """Every verb that usp sends with, with bytes that say whence they come.

    Raises:
        Wrong: after the last one, for the other ranks go on.
    """
    wrong: list[str] = []

    def from_rank(rank: int, count: int) -> Tensor:
        numbers = torch.arange(count, device=device) * 7 + rank * 31
        return (numbers % 251).to(torch.uint8)

    def expect(verb: str, found: Tensor, expected: Tensor) -> None:
        bad = int((found != expected).sum())
        if bad:
            wrong.append(f"{verb}: {bad} of {expected.numel()} bytes are not those that were sent")

    size, rank, count = axis.size, axis.rank, 1009
    for by in (1, -1):
        found = axis.shift(from_rank(rank, count), torch.zeros_like(from_rank(0, count)), by)()
        expect("shift", found, from_rank((rank - by) % size, count))
    sizes = [count + r for r in range(size)]
    for verb, lengths in (("all-gather", [count] * size), ("uneven all-gather", sizes)):
        whole = torch.zeros(sum(lengths), dtype=torch.uint8, device=device)
        axis.all_gather(from_rank(rank, lengths[rank]), whole, lengths)()
        expect(verb, whole, torch.cat([from_rank(r, n) for r, n in enumerate(lengths)]))
    pieces = [from_rank(rank, n) for n in sizes]
    came = axis.all_to_all(torch.cat(pieces), sizes, [sizes[rank]] * size)
    expect("all-to-all", came, torch.cat([from_rank(r, sizes[rank]) for r in range(size)]))
    total = axis.all_reduce(from_rank(rank, count).to(torch.float32))
    expected = torch.stack([from_rank(r, count).float() for r in range(size)]).sum(0)
    expect("all-reduce", total, expected)
    if axis.gather_objects(("rank", rank)) != [("rank", r) for r in range(size)]:
        wrong.append("gathered objects are not those that were given")
    if wrong:
        raise Wrong("; ".join(wrong))
    return "shift, all-gather, all-to-all, all-reduce, objects"
