"""What is computed in ring benchmarks: one sequence by several processes, three ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from _attention_case import DTYPES, NAMES, differentiated, relative_error
from _exact_rows import exact_rows, sampled_positions
from _plain_ring import plain_ring_attention
from torch import Tensor

import usp
from usp.planning.cost import Bytes, Place, Shape, bytes_sent
from usp.planning.masks.mask import Mask
from usp.planning.masks.options import make_mask
from usp.planning.shares import local_positions

PROCESSES, CORES = 4, 2
MESHES = {"2 x 2": (2, 2), "1 x 4": (1, 4), "4 x 1": (4, 1)}  # ulysses x ring
ALONE, PLAIN = "one process", "plain ring"
SAMPLES = 64
# Relative rms error above which nothing is timed; an upper bound for right results of either side.
ALLOWED = {"fp32": 1e-5, "bf16": 2e-2}


@dataclass(frozen=True)
class RingCase:
    dtype: str
    head_dim: int
    length: int
    mask: str
    heads: int

    @property
    def causal(self) -> bool:
        return self.mask == "causal"

    @property
    def layout(self) -> str:
        return "zigzag" if self.causal else "contiguous"

    def bytes_sent(self, degrees: tuple[int, int], backward: bool) -> Bytes:
        """By the rank that sends most, in a forward or a backward of usp."""
        ulysses, ring = degrees
        n, h, d = self.length, self.heads, self.head_dim
        shape = Shape(1, n, n, h, h, d, d, DTYPES[self.dtype])
        mask: Mask = make_mask(causal=self.causal)
        places = (
            Place(ring, ulysses, r, u, self.layout, mask)
            for r in range(ring)
            for u in range(ulysses)
        )
        return max((bytes_sent(shape, p, backward) for p in places), key=lambda b: b.total)


class RingAttention:
    """One rank's view of a case: its candidates, and what they give at sampled positions.

    Args:
        case: The same on every rank.
        meshes: Of usp, by name; this rank is in each.
    """

    def __init__(self, case: RingCase, meshes: dict[str, usp.SequenceMesh]) -> None:
        self.case, self.meshes = case, meshes
        generator = torch.Generator().manual_seed(0)
        shape = (1, case.length, case.heads, case.head_dim)
        dtype = DTYPES[case.dtype]
        self._whole = [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]
        self._shards = {name: self._cut(self._indices(name)) for name in (*meshes, PLAIN)}
        if dist.get_rank() > 0:
            self._whole = []

    def candidates(self, which: str) -> dict[str, Callable[[], list[Tensor]]]:
        """By name; ``which`` is one of PASSES. On other ranks than 0, ALONE does nothing."""
        found: dict[str, Callable[[], list[Tensor]]] = {
            name: self._of_mesh(name, which) for name in self.meshes
        }
        return {**found, ALONE: lambda: self._alone(which), PLAIN: lambda: self._plain(which)}

    def errors(self) -> dict[str, dict[str, float]]:
        """Relative rms error of each candidate's results at the samples; empty but on rank 0."""
        at = sampled_positions(self.case.length, SAMPLES)
        with threads(CORES if dist.get_rank() == 0 else 1):
            exact = self._exact(at)
        found = {}
        for name, run in self.candidates("both").items():
            results = self._gathered(name, run(), at)
            found[name] = {
                tensor: relative_error(ours, reference)
                for tensor, ours, reference in zip(NAMES, results, exact, strict=False)
            }
        return found

    def _indices(self, name: str) -> Tensor:
        """Positions of this rank's tokens. The plain ring holds those of a ring of all."""
        if name == ALONE:
            return torch.arange(self.case.length)
        degrees, rank = (PROCESSES, 1), (dist.get_rank(), 0)
        if name in self.meshes:
            mesh = self.meshes[name]
            degrees = (mesh.ring_degree, mesh.ulysses_degree)
            rank = (mesh.ring_rank, mesh.ulysses_rank)
        return local_positions(self.case.layout, self.case.length, *degrees, rank)

    def _cut(self, index: Tensor) -> list[Tensor]:
        return [x.index_select(1, index) for x in self._whole]

    def _of_mesh(self, name: str, which: str) -> Callable[[], list[Tensor]]:
        module = usp.LongContextAttention(
            self.meshes[name],
            causal=self.case.causal,
            layout=self.case.layout,
            seq_len=self.case.length,
            backend="native",
        )
        *leaves, dout = self._shards[name]
        leaves = [x.detach().requires_grad_() for x in leaves]
        return lambda: differentiated(module, leaves, dout, which)

    def _alone(self, which: str) -> list[Tensor]:
        if dist.get_rank() > 0:
            return []
        module = usp.LongContextAttention(causal=self.case.causal, backend="native")
        *leaves, dout = self._whole
        with threads(CORES):
            return differentiated(module, [x.requires_grad_() for x in leaves], dout, which)

    @cached_property
    def _heads_first(self) -> list[Tensor]:
        return [x.transpose(1, 2).contiguous() for x in self._shards[PLAIN]]

    def _plain(self, which: str) -> list[Tensor]:
        *leaves, dout = self._heads_first

        def attend(*leaves: Tensor) -> Tensor:
            return plain_ring_attention(*leaves, self.case.causal)

        leaves = [x.requires_grad_() for x in leaves]
        return [x.transpose(1, 2) for x in differentiated(attend, leaves, dout, which)]

    def _exact(self, at: Tensor) -> list[Tensor]:
        if dist.get_rank() > 0:
            return []
        *leaves, dout = (x.transpose(1, 2) for x in self._whole)
        return [x.transpose(1, 2) for x in exact_rows(leaves, dout, at, self.case.causal)]

    def _gathered(self, name: str, results: list[Tensor], at: Tensor) -> list[Tensor]:
        """Rows ``at`` of the whole, collected from all ranks on rank 0."""
        index = self._indices(name)
        here = torch.isin(index, at)
        mine = (index[here], [x[:, here] for x in results])
        everyone: list[Any] | None = [None] * PROCESSES if dist.get_rank() == 0 else None
        dist.gather_object(mine, everyone)
        if everyone is None:
            return []
        parts = [part for part in everyone if part[1]]
        order = torch.cat([positions for positions, _ in parts]).argsort()
        return [torch.cat(rows, 1)[:, order] for rows in zip(*(r for _, r in parts), strict=True)]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
