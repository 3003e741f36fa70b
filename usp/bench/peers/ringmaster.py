"""The ring of axolotl-ringmaster: p2p, on CPUs by its own arithmetic in torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from usp.bench.case import Case
from usp.bench.peers import missing

NAME = "axolotl-ringmaster"


def unavailable() -> str | None:
    return missing(NAME, "ringmaster.ring.p2p_attn")


def reason_against(case: Case, size: int) -> str | None:
    if case.mask not in ("full", "causal"):
        return f"its p2p ring knows no {case.mask}"
    if case.length % size:
        return f"{case.length} tokens do not divide by {size}"
    return None


def positions(case: Case, rank: int, size: int) -> Tensor:
    return torch.arange(case.length).view(size, -1)[rank]


def make(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from ringmaster.ring.p2p_attn import ring_p2p_attention

    scaling = case.head_dim**-0.5

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        out: Tensor = ring_p2p_attention(
            *heads_first, group=dist.group.WORLD, causal=case.is_causal, scaling=scaling
        )
        return out

    return attend
