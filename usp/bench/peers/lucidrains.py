"""The ring of lucidrains' ring-attention-pytorch, in torch's own operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from usp.bench.case import Case
from usp.bench.peers import missing

NAME = "ring-attention-pytorch"
BUCKET = 512  # the default of its module


def unavailable() -> str | None:
    return missing(NAME, "ring_attention_pytorch.ring_flash_attention")


def reason_against(case: Case, size: int) -> str | None:
    if case.mask not in ("full", "causal"):
        return f"it knows no {case.mask}"
    if case.dtype != "fp32":
        return "its sums are in the dtype of the inputs"
    if case.length % size or (case.length // size) % min(BUCKET, case.length // size):
        return f"{case.length} tokens do not divide into {size} times buckets of {BUCKET}"
    return None


def positions(case: Case, rank: int, size: int) -> Tensor:
    return torch.arange(case.length).view(size, -1)[rank]


def make(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = ring_flash_attn(
            q, k, v, causal=case.is_causal, bucket_size=BUCKET, ring_reduce_col=True
        )
        return out

    return attend
