"""What a layer costs here, by calls that are timed: for a schedule of documents."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import usp
from usp.bench import world as worlds
from usp.bench.document_batch import Layer, gradients_of
from usp.distributed.submeshes import Submeshes as Meshes
from usp.planning.degrees import Degrees, Placed

_ROUNDS = 7
_SHORT = 64  # tokens of the short documents
_SHARED = 512  # tokens of a rank in a document that all share


@dataclass(frozen=True)
class CostOfLayer:
    """Times this layer: all ranks together, the slowest counts; alike on all ranks.

    Attributes:
        args: Sizes.
        device: "cpu" or "cuda".
        clock: "wall"; "cpu" where others use the machine, too, or ranks share its cores.
    """

    args: argparse.Namespace
    dtype: torch.dtype
    device: str
    clock: str

    def __call__(self, rings: Meshes, ulysses: usp.SequenceMesh | None) -> usp.DocumentCost:
        """By rings that lie in each other, and by a mesh of Ulysses alone."""
        long = max(1024, min(4096, max(self.args.tokens) // 4))
        # as many tokens in both, so that what a call costs however short it is counts to neither
        (few, pairs), (many, all_pairs) = (self._packed(long, each) for each in (_SHORT, long))
        pair = max(0.0, (many - few) / (all_pairs - pairs))
        call, hop = self._fixed(rings)
        once = self._attention(1, None)
        return usp.DocumentCost(
            token=max(0.0, (few - once - pair * pairs) / long),
            pair=pair,
            sent=self._passed(rings[0], once) if rings[0] else 0.0,
            hop=hop,
            exchanged=self._exchange(ulysses, once) if ulysses else 0.0,
            call=call,
        )

    def _fixed(self, rings: Meshes) -> tuple[float, float]:
        """Of a call and a message: the layer with a token a rank in documents that are shared."""
        sizes = [mesh.size for mesh in rings if mesh]
        most, least = sizes[0], sizes[-1]
        alone = self._shared(rings, None)
        extra = {size: max(0.0, self._shared(rings, size) - alone) for size in {most, least}}
        if most == least:
            return extra[most], 0.0
        hop = max(0.0, extra[most] - extra[least]) / (most - least)
        return max(0.0, extra[least] - hop * (least - 1)), hop

    def _shared(self, meshes: Meshes, degree: int | None) -> float:
        """The layer on short documents of each rank, and tiny ones of groups of a degree."""
        assert meshes[0] is not None
        ranks = meshes[0].size
        documents = [(_SHORT, Placed(1, rank)) for rank in range(ranks)] * (_SHARED // _SHORT)
        if degree:
            documents += [(degree, Placed(degree, group)) for group in range(ranks // degree)]
        cuts = (0, *accumulate(length for length, _ in documents))
        placed = tuple(place for _, place in documents)
        schedule = usp.DocumentSchedule(meshes, cuts, Degrees(placed, ((0.0, 0),) * ranks))
        attend = partial(schedule.attention, causal=True, validate=False)
        return self._layer(len(schedule.positions), attend)

    def _passed(self, mesh: usp.SequenceMesh, call: float) -> float:
        """Of a token that travels: one document, which all share."""
        least, whole = self._attention(1, mesh), self._attention(_SHARED, mesh)
        # as many pairs as each rank has of it
        alone = self._attention(round(_SHARED * mesh.size**0.5), None)
        return max(0.0, (whole - least) - (alone - call)) / (_SHARED * (mesh.size - 1))

    def _exchange(self, mesh: usp.SequenceMesh, call: float) -> float:
        """Of a token whose heads are exchanged: short documents, in which there are few pairs."""
        tokens = 4 * _SHARED  # each is soon there
        least, whole = self._attention(1, mesh), self._attention(tokens, mesh, _SHORT)
        alone = self._attention(tokens, None, _SHORT)
        moved = tokens * (mesh.size - 1) / mesh.size
        return max(0.0, (whole - least) - (alone - call)) / moved

    def _packed(self, tokens: int, length: int) -> tuple[float, float]:
        """Seconds of the layer on packed documents of one length, and their pairs."""
        cuts = tuple(range(0, tokens + 1, length))
        attend = partial(usp.long_context_attention, causal=True, cu_seqlens=cuts)
        return self._layer(tokens, attend), tokens * (length + 1) / 2

    def _layer(self, tokens: int, attend: Callable[..., Any]) -> float:
        layer = Layer(self.args).to(self.dtype).to(self.device)
        x = torch.randn(1, tokens, self.args.hidden).to(self.dtype).to(self.device)
        return self._seconds(lambda: gradients_of(layer, layer(x, attend), x))

    def _attention(
        self, tokens: int, mesh: usp.SequenceMesh | None, length: int | None = None
    ) -> float:
        """Of so many tokens on each rank, in documents of one length or one document."""
        shape = (1, tokens, self.args.heads, self.args.hidden // self.args.heads)
        qkv = [torch.randn(shape).to(self.dtype).to(self.device).requires_grad_() for _ in "qkv"]
        whole = tokens * (mesh.size if mesh else 1)
        in_ring = mesh is not None and mesh.ring_degree > 1
        layout = usp.DocumentZigzag((0, whole)) if in_ring else "contiguous"
        cuts = tuple(range(0, whole + 1, length)) if length else (0, whole)
        spread = usp.Spread(mesh, layout, whole, cuts, validate=False)

        def both() -> Sequence[Tensor]:
            out = spread.attention(*qkv, causal=True)
            assert isinstance(out, Tensor)
            return torch.autograd.grad(out, qkv, out.detach())

        return self._seconds(both)

    def _seconds(self, run: Callable[[], object]) -> float:
        run()
        if self.clock == "wall" or self.device != "cpu":
            return min(worlds.slowest_seconds(run) for _ in range(_ROUNDS))
        found = []
        for _ in range(_ROUNDS):
            worlds.everyone(None)  # together
            begun = time.process_time()
            run()
            found.append(time.process_time() - begun)
        return float(max(worlds.everyone(min(found))))
