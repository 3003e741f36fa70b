"""What is computed in a ring benchmark: one rank's view of a sequence that all share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

import usp
from usp.bench import world as worlds
from usp.bench.case import Case
from usp.bench.device import DTYPES
from usp.bench.exact import NAMES, exact_heads, relative_error
from usp.bench.world import World
from usp.planning.cost import Place, Shape, bytes_sent
from usp.planning.masks.options import make_mask
from usp.planning.shares import local_positions
from usp.testing import WireBytes

ALONE = "usp, one process"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def name_of(shape: tuple[int, int]) -> str:
    """Of usp on a mesh of (Ulysses, ring) degrees."""
    return f"usp {shape[0]} x {shape[1]}"


class RingAttention:
    """One rank's view of a case: its candidates, and what they give.

    Ranks do not compare their arguments at each call, as they would not in a step of a training.

    Args:
        case: The same on every rank.
        meshes: Of usp, by name; this rank is in each.
        peers: Modules of ``usp.bench.peers`` that can run here.
    """

    def __init__(
        self, case: Case, meshes: dict[str, usp.SequenceMesh], peers: list[Any], world: World
    ) -> None:
        self.case, self.meshes, self.world = case, meshes, world
        self.rank, size = worlds.axis().rank, world.size
        self.layout = world.args.layout or ("zigzag" if case.is_causal else "contiguous")
        against = {p.NAME: p.reason_against(case, size) for p in peers}
        self.reasons = {name: why for name, why in against.items() if why is not None}
        self.peers = {p.NAME: p for p in peers if p.NAME not in self.reasons}
        self.names = [*meshes, ALONE, *self.peers]
        generator = torch.Generator().manual_seed(0)

        def randn(heads: int) -> Tensor:
            shape = (case.batch, case.length, heads, case.head_dim)
            return torch.randn(shape, generator=generator).to(DTYPES[case.dtype])

        heads = case.heads, case.kv_heads, case.kv_heads, case.heads
        self._whole = [randn(count) for count in heads]
        self._calls = {name: self._prepared(name) for name in self.names}

    def _prepared(self, name: str) -> tuple[Attend, list[Tensor]]:
        """The function, and this rank's q, k, v, dout."""
        index = self.positions(name)
        *leaves, dout = (x.index_select(1, index).to(self.world.device) for x in self._whole)
        shard = [*(x.requires_grad_() for x in leaves), dout]
        if name in self.peers:
            return self.peers[name].make(self.case), shard
        options = dict(self.case.options)
        if name == ALONE:
            return cast(Attend, partial(usp.long_context_attention, **options)), shard
        options |= {"layout": self.layout, "seq_len": self.case.length}
        options |= {"transport": self.world.args.transport, "validate": "never"}
        return cast(Attend, usp.LongContextAttention(self.meshes[name], **options)), shard

    def positions(self, name: str) -> Tensor:
        """Of this rank's tokens."""
        case = self.case
        if name == ALONE:
            return torch.arange(case.length)
        if name in self.peers:
            found: Tensor = self.peers[name].positions(case, self.rank, self.world.size)
            return found
        mesh = self.meshes[name]
        degrees = (mesh.ring_degree, mesh.ulysses_degree)
        place = (mesh.ring_rank, mesh.ulysses_rank)
        return local_positions(self.layout, case.length, *degrees, place)

    def candidate(self, name: str, which: str) -> Callable[[], list[Tensor]]:
        """A call; on other ranks than 0, ALONE does nothing."""
        attend, (*leaves, dout) = self._calls[name]
        run = partial(differentiated, attend, leaves, dout, which)
        if name != ALONE:
            return run
        if self.rank > 0:
            return list

        def alone() -> list[Tensor]:
            with worlds.threads(self.world.cores):
                return run()

        return alone

    def judged(self) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
        """Relative rms errors of the last key head's group on rank 0; who raised, and what."""
        runs = {name: self.candidate(name, "both") for name in self.names}
        results, failed = worlds.tried_together(runs)
        exact = self._exact() if self.rank == 0 else {}
        group, errors = self.case.group, {}
        heads: dict[str, Any] = {"out": slice(-group, None), "dq": slice(-group, None)}
        heads |= {"dk": -1, "dv": -1}
        for name in results:
            parts = [x[-1:][:, :, heads[n]] for n, x in zip(NAMES, results[name], strict=False)]
            if name != ALONE:
                parts = worlds.rows_of_all(self.positions(name), parts)
            if self.rank == 0:
                pairs = zip(NAMES, parts, strict=True)
                errors[name] = {
                    n: relative_error(x[0].to(exact[n].device), exact[n]) for n, x in pairs
                }
        return errors, failed

    def _exact(self) -> dict[str, Tensor]:
        q, k, v, dout = (x[-1].to(self.world.device) for x in self._whole)
        group = self.case.group
        tensors = (q[:, -group:], k[:, -1], v[:, -1], dout[:, -group:])
        with worlds.threads(self.world.cores):
            return exact_heads(
                tensors, self.case.interval(self.world.device), self.case.head_dim**-0.5
            )

    def counted(self, name: str, run: Callable[[], object], which: str) -> tuple[int, int | None]:
        """Bytes that leave the busiest rank, and what the formula says, where there is one."""
        with WireBytes() as wire:
            run()
        formula = None
        if name in self.meshes:
            passes = (False, True) if which == "both" else (False,)
            formula = sum(self._formula(name, backward) for backward in passes)
        told = worlds.everyone((wire.sent, formula))
        differs = [pair for pair in told if pair[1] is not None and pair[0] != pair[1]]
        found: tuple[int, int | None] = differs[0] if differs else max(told, key=lambda p: p[0])
        return found

    def _formula(self, name: str, backward: bool) -> int:
        case, mesh = self.case, self.meshes[name]
        n, d = case.length, case.head_dim
        shape = Shape(case.batch, n, n, case.heads, case.kv_heads, d, d, DTYPES[case.dtype])
        mask = make_mask(**case.options)
        degrees = (mesh.ring_degree, mesh.ulysses_degree, mesh.ring_rank, mesh.ulysses_rank)
        place = Place(*degrees, self.layout, mask, self.world.args.transport)
        return bytes_sent(shape, place, backward).total


def differentiated(attend: Attend, leaves: list[Tensor], dout: Tensor, which: str) -> list[Tensor]:
    """out, and with ``which`` "both" the gradients of q, k, v."""
    if which == "forward":
        with torch.no_grad():
            return [attend(*leaves)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]
