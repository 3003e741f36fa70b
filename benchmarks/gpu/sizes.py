"""How large the problems of the GPU benchmark are, and in which order they come."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu.case import local_case
from usp.bench.case import Case
from usp.bench.device import DTYPES


@dataclass(frozen=True)
class Sizes:
    """Problems of one device.

    Attributes:
        core, rest: Local attention before and after all else.
        step_lengths: Local tokens of one ring step, of ``2 * ring_heads`` heads.
        rings: Ranks; each holds ``ring_length`` tokens of ``ring_heads`` heads.
        exchange_ranks: Of a head exchange of ``exchange_tokens`` of ``exchange_heads`` heads.
        dtype, head_dim: Of all but local attention.
    """

    core: tuple[Case, ...]
    rest: tuple[Case, ...]
    step_lengths: tuple[int, ...]
    rings: tuple[int, ...]
    ring_length: int
    ring_heads: int
    exchange_ranks: tuple[int, ...]
    exchange_tokens: int
    exchange_heads: int
    dtype: str
    head_dim: int

    def randn(self, device: str, *shape: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        return torch.randn(shape, generator=generator, device=device).to(DTYPES[self.dtype])


def sizes_for(device: str) -> Sizes:
    """Of a GPU those of the field; of a CPU, which interprets kernels, such as take seconds."""
    return _gpu() if device == "cuda" else _cpu()


def _gpu() -> Sizes:
    core = [local_case("bf16", 128, n, mask) for n in (8192, 32768) for mask in ("causal", "full")]
    core += [
        local_case("bf16", 128, n, mask) for n in (8192, 32768) for mask in ("window", "documents")
    ]
    core += [local_case("bf16", 128, 16384, mask) for mask in ("causal", "full")]
    rest = [local_case("bf16", dim, 8192, "causal") for dim in (64, 256)]
    rest += [local_case("fp16", dim, 8192, "causal") for dim in (128, 64, 256)]
    masks, lengths = ("causal", "full", "gqa"), (8192, 1024, 65536, 4096, 32768, 2048, 16384)
    rest += [local_case("bf16", 128, n, m) for m, n in itertools.product(masks, lengths)]
    rest += [
        local_case("bf16", d, n, m) for d, n, m in itertools.product((64, 256), lengths, masks)
    ]
    rest += [local_case("fp16", d, 8192, m) for d, m in itertools.product((128, 64, 256), masks)]
    return Sizes(
        core=tuple(core),
        rest=tuple(case for case in dict.fromkeys(rest) if case not in core),
        step_lengths=(1024, 2048, 4096, 8192),
        rings=(4, 8, 2),
        ring_length=8192,
        ring_heads=8,
        exchange_ranks=(8, 4, 2),
        exchange_tokens=8192,
        exchange_heads=32,
        dtype="bf16",
        head_dim=128,
    )


def _cpu() -> Sizes:
    """fp16: Triton's interpreter multiplies the bits of bf16."""
    window = local_case("fp16", 16, 32, "window", tokens=32, width=32, window=11)
    documents = local_case("fp16", 16, 48, "documents", tokens=48, width=16)
    full, gqa = (local_case("fp16", 16, 16, mask, tokens=32, width=128) for mask in ("full", "gqa"))
    return Sizes(
        core=(local_case("fp16", 16, 32, "causal", tokens=64, width=16), window),
        rest=(documents, full, gqa),
        step_lengths=(32,),
        rings=(2,),
        ring_length=24,
        ring_heads=1,
        exchange_ranks=(2, 3),
        exchange_tokens=24,
        exchange_heads=6,
        dtype="fp16",
        head_dim=16,
    )
