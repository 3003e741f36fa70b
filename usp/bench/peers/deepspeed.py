"""DeepSpeed-Ulysses: its exchange of heads around torch's own attention."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from usp.bench.case import Case
from usp.bench.peers import missing

NAME = "DeepSpeed-Ulysses"


def unavailable() -> str | None:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return missing("deepspeed", "deepspeed.sequence.layer")


def reason_against(case: Case, size: int) -> str | None:
    if case.mask not in ("full", "causal"):
        return f"torch's attention knows no {case.mask} without a matrix"
    if case.kv_heads % size:
        return f"{case.kv_heads} key heads do not divide by {size}"
    if case.length % size:
        return f"{case.length} tokens do not divide by {size}"
    return None


def positions(case: Case, rank: int, size: int) -> Tensor:
    return torch.arange(case.length).view(size, -1)[rank]


def make(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist.get_backend(), verbose=False)

    def local(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options: dict[str, Any] = {"is_causal": case.is_causal, "enable_gqa": case.group > 1}
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    attention = DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attention(q, k, v, batch_dim_idx=0)
        return out

    return attend
