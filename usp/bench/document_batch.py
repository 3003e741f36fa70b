"""A layer, a batch of packed documents with a long tail, and the ways to share it among ranks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import usp
from usp.bench import world as worlds
from usp.bench.exact import relative_error

Attend = Callable[..., Tensor]


class Way(NamedTuple):
    """One way to share a batch.

    Attributes:
        run: This rank's output, and the gradients of all parameters, summed over ranks.
        positions: Of this rank's tokens in the batch.
        transport: Of keys; "auto" where it was not chosen by a clock.
    """

    run: Callable[[], list[Tensor]]
    positions: Tensor
    transport: str = "auto"


class Layer(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.heads = args.heads
        self.norms = nn.ModuleList(nn.LayerNorm(args.hidden) for _ in range(2))
        self.qkv = nn.Linear(args.hidden, 3 * args.hidden)
        self.out = nn.Linear(args.hidden, args.hidden)
        self.up, self.down = nn.Linear(args.hidden, args.mlp), nn.Linear(args.mlp, args.hidden)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.out(attend(*qkv).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Batch:
    """A layer and packed documents; on rank 0 what fp64 on one process makes of them."""

    def __init__(
        self, args: argparse.Namespace, dtype: torch.dtype, device: str, cuts: tuple[int, ...]
    ) -> None:
        self.cuts = cuts
        torch.manual_seed(0)
        self.layer = Layer(args).to(dtype)
        self.x = torch.randn(1, self.cuts[-1], args.hidden).to(dtype)
        self.cotangent = torch.randn(self.x.shape).to(dtype)
        self.exact = None
        if worlds.axis().rank == 0:
            alone = Layer(args).double()
            alone.load_state_dict(self.layer.state_dict())
            attend = partial(usp.long_context_attention, causal=True, cu_seqlens=self.cuts)
            out = alone(self.x.double(), attend)
            self.exact = out.detach(), _flat(gradients_of(alone, out, self.cotangent.double()))
        self.layer.to(device)
        self.x, self.cotangent = self.x.to(device), self.cotangent.to(device)

    def scheduled(self, schedule: usp.DocumentSchedule) -> Way:
        attend = partial(schedule.attention, causal=True, validate=False)
        run = partial(self._run, lambda x: schedule.shard(x, 1), attend)
        return Way(run, schedule.positions)

    def static(self, mesh: usp.SequenceMesh) -> Iterator[tuple[str, list[Way]]]:
        """All documents over all ranks: of each layout, by every transport that it can take."""
        layouts: dict[str, Any] = {"contiguous": "contiguous"}
        transports = ["auto"]
        if mesh.ring_degree > 1:
            layouts |= {"zigzag": "zigzag", "striped": "striped"}
            layouts["zigzag of documents"] = usp.DocumentZigzag(self.cuts)
            transports = ["ring", "direct", "allgather"]
        for name, layout in layouts.items():
            spread = usp.Spread(mesh, layout, self.cuts[-1], self.cuts, validate=False)
            positions = usp.positions(self.cuts[-1], mesh, layout)
            yield (
                name,
                [Way(self._static(spread, each), positions, each) for each in transports],
            )

    def _static(self, spread: usp.Spread, transport: str) -> Callable[[], list[Tensor]]:
        attend: Attend = partial(spread.attention, causal=True, transport=transport)  # type: ignore[assignment]
        return partial(self._run, spread.shard, attend)

    def _run(self, shard: Callable[[Tensor], Tensor], attend: Attend) -> list[Tensor]:
        out = self.layer(shard(self.x), attend)
        gradients = _flat(gradients_of(self.layer, out, shard(self.cotangent)))
        return [out.detach(), worlds.axis().all_reduce(gradients)]

    def errors(self, way: Way) -> dict[str, float]:
        """Of the whole output and of the summed gradients; on rank 0."""
        out, gradients = way.run()
        whole = worlds.rows_of_all(way.positions, [out])
        if self.exact is None:
            return {}
        return {
            "out": relative_error(whole[0], self.exact[0]),
            "parameters": relative_error(gradients.cpu(), self.exact[1]),
        }


def gradients_of(layer: nn.Module, out: Tensor, cotangent: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, list(layer.parameters()), cotangent))


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])
