"""What is computed in attention benchmarks: one case, by usp and by torch's own attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from usp import long_context_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MASKS = ("full", "causal", "window", "documents", "gqa")
PASSES = ("forward", "both")
NAMES = ("out", "dq", "dk", "dv")
EXACT_ZERO = 1e-12  # what fp64 leaves of dq and dk where each query sees one key
WINDOW, DOCUMENTS, GROUP = 1024, 8, 8
TOKENS = 4096  # of a call at least: short sequences come in batches


@dataclass(frozen=True)
class Case:
    dtype: str
    head_dim: int
    length: int
    mask: str
    heads: int
    batch: int = 1

    @property
    def kv_heads(self) -> int:
        return self.heads // GROUP if self.mask == "gqa" else self.heads

    @property
    def boundaries(self) -> tuple[int, ...]:
        return tuple(self.length * i // DOCUMENTS for i in range(DOCUMENTS + 1))

    @property
    def options(self) -> dict[str, Any]:
        """Of usp."""
        if self.mask == "window":
            return {"causal": True, "window_size": (WINDOW - 1, 0)}
        if self.mask == "documents":
            return {"cu_seqlens": self.boundaries}
        return {"causal": self.mask == "causal"}

    @cached_property
    def sdpa_options(self) -> dict[str, Any]:
        if self.mask == "window":
            ones = torch.ones(self.length, self.length, dtype=torch.bool)
            return {"attn_mask": ones.tril().triu(1 - WINDOW)}
        if self.mask == "documents":
            edges = torch.tensor(self.boundaries[1:])
            which = torch.bucketize(torch.arange(self.length), edges, right=True)
            return {"attn_mask": which[:, None] == which}
        return {"is_causal": self.mask == "causal", "enable_gqa": self.mask == "gqa"}

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head."""
        n = self.length
        if self.mask == "causal":
            return n * (n + 1) // 2
        if self.mask == "window":
            w = min(WINDOW, n)
            return n * w - w * (w - 1) // 2
        if self.mask == "documents":
            return sum((b - a) ** 2 for a, b in itertools.pairwise(self.boundaries))
        return n * n

    def flops(self, which: str) -> float:
        pairs = self.pairs * self.heads * self.batch
        return (4 if which == "forward" else 14) * pairs * self.head_dim


class WrongResult(Exception):
    """usp's error is too large to time it."""


class Attention:
    """Inputs of a case in both layouts, and the two ways to compute it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(0)

        def randn(heads: int) -> Tensor:
            shape = (case.batch, case.length, heads, case.head_dim)
            return torch.randn(shape, generator=generator).to(DTYPES[case.dtype])

        self.ours = [randn(case.heads), randn(case.kv_heads), randn(case.kv_heads)]
        self.dout = randn(case.heads)
        self.theirs = [x.transpose(1, 2).contiguous() for x in self.ours]
        self.their_dout = self.dout.transpose(1, 2).contiguous()
        for x in (*self.ours, *self.theirs):
            x.requires_grad_()

    def usp(self, which: str) -> list[Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return long_context_attention(q, k, v, backend="native", **self.case.options)

        return differentiated(attend, self.ours, self.dout, which)

    def sdpa(self, which: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        leaves, dout = self.theirs, self.their_dout
        if dtype is not None:
            leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
            dout = dout.to(dtype)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, **self.case.sdpa_options)

        return differentiated(attend, leaves, dout, which)


def differentiated(
    attend: Callable[..., Tensor], leaves: list[Tensor], dout: Tensor, which: str
) -> list[Tensor]:
    if which == "forward":
        with torch.no_grad():
            return [attend(*leaves)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Root mean square of the error over that of the exact values; of the error if they are 0."""
    error, scale = (y.square().mean().sqrt().item() for y in (x.double() - exact, exact))
    return error / scale if scale > EXACT_ZERO else error


def errors(case: Case, attention: Attention, which: str) -> dict[str, tuple[float, float]]:
    """Relative rms error against fp64 of usp and of SDPA.

    Raises:
        WrongResult: that of usp is above 1.25 times SDPA's, and above rounding in fp32.
    """
    exact = [x.transpose(1, 2) for x in attention.sdpa(which, torch.float64)]
    theirs = [x.transpose(1, 2) for x in attention.sdpa(which)]

    found = {}
    triples = zip(attention.usp(which), theirs, exact, strict=True)
    for name, (our, their, reference) in zip(NAMES, triples, strict=False):
        ours, sdpa = relative_error(our, reference), relative_error(their, reference)
        floor = 16 * torch.finfo(torch.float32).eps  # both are exact there
        if not ours <= max(1.25 * sdpa, floor):
            raise WrongResult(f"{case}: {name} is off by {ours:.2e}, SDPA by {sdpa:.2e}: not timed")
        found[name] = (ours, sdpa)
    return found
