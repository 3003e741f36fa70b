"""What the GPU benchmark computes: one case of local attention, by usp and by whoever is there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from _attention_case import DTYPES, GROUP, WINDOW
from _gpu_exact import NAMES, exact_heads, relative_error
from _gpu_own import Own, own
from torch import Tensor

from usp import long_context_attention

Run = Callable[[], Any]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# gqa: causal, GROUP query heads for a key head. window and documents are causal, too.
MASKS = ("causal", "full", "gqa", "window", "documents")
DOCUMENT_CUTS = (0, 1, 3, 4, 8, 9, 13, 15, 16)  # sixteenths of a sequence: uneven, as packed ones
FLOPS = {"forward": 4.0, "backward": 10.0}  # of a visible pair, a head and a head dim


@dataclass(frozen=True)
class Case:
    """``tokens`` in all, cut into sequences of ``length``; ``width`` = heads x head_dim."""

    dtype: str
    head_dim: int
    length: int
    mask: str
    tokens: int = 16384
    width: int = 2048
    window: int = WINDOW

    @property
    def key(self) -> str:
        return f"local {self.mask} {self.dtype} {self.head_dim} {self.length}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return max(1, self.tokens // self.length), self.length, self.heads, self.head_dim

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def kv_heads(self) -> int:
        return max(1, self.heads // GROUP) if self.mask == "gqa" else self.heads

    @property
    def is_causal(self) -> bool:
        return self.mask != "full"

    @property
    def boundaries(self) -> tuple[int, ...]:
        return tuple(self.length * cut // 16 for cut in DOCUMENT_CUTS)

    @property
    def options(self) -> dict[str, Any]:
        """Of usp."""
        if self.mask == "window":
            return {"causal": True, "window_size": (self.window - 1, 0)}
        if self.mask == "documents":
            return {"causal": True, "cu_seqlens": self.boundaries}
        return {"causal": self.is_causal}

    @property
    def pairs(self) -> float:
        """Visible pairs of a head, counted the usual way: a causal mask halves."""
        n = float(self.length)
        if self.mask == "window":
            w = min(float(self.window), n)
            return n * w - w * (w - 1) / 2
        if self.mask == "documents":
            return sum((b - a) ** 2 / 2 for a, b in itertools.pairwise(self.boundaries))
        return n * n / 2 if self.is_causal else n * n

    def flops(self, which: str) -> float:
        return FLOPS[which] * self.shape[0] * self.heads * self.pairs * self.head_dim

    def interval(self, device: str) -> tuple[Tensor, Tensor] | None:
        """First key and one past the last that each row sees; None for all."""
        if self.mask == "full":
            return None
        stop = torch.arange(1, self.length + 1, device=device)
        first = torch.zeros_like(stop)
        if self.mask == "window":
            first = (stop - self.window).clamp_min(0)
        if self.mask == "documents":
            for a, b in itertools.pairwise(self.boundaries):
                first[a:b] = a
        return first, stop


class Problem:
    """Inputs of a case on a device, and every way to compute it, by name.

    Each is a function of q, k, v (B, L, H, D) that returns out in the same layout.
    """

    def __init__(self, case: Case, device: str, rivals: dict[str, Attend]) -> None:
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(0)
        batch, length, heads, head_dim = case.shape

        def randn(num_heads: int) -> Tensor:
            shape = (batch, length, num_heads, head_dim)
            x = torch.randn(shape, generator=generator, device=device)
            return x.to(DTYPES[case.dtype])

        self.leaves = [randn(heads), randn(case.kv_heads), randn(case.kv_heads)]
        self.dout = randn(heads)
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.own = own(DTYPES[case.dtype], case.head_dim, device)
        ours = {name: self._usp(contestant) for name, contestant in self.own.items()}
        self.candidates: dict[str, Attend] = ours | rivals

    def _usp(self, contestant: Own) -> Attend:
        options = self.case.options | {"backend": contestant.backend.NAME}

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = contestant(partial(long_context_attention, **options), q, k, v)
            assert isinstance(out, Tensor)
            return out

        return attend

    def run(self, name: str, which: str) -> Run:
        """One forward, or one backward through a graph that is kept."""
        attend = self.candidates[name]
        if which == "forward":

            def forward() -> Tensor:
                # FlexAttention would be compiled once more
                with torch.set_grad_enabled(name == "flex"):
                    return attend(*self.leaves)

            return forward
        out = attend(*self.leaves)
        return partial(self._grads, name, out)

    def _grads(self, name: str, out: Tensor) -> tuple[Tensor, ...]:
        grad = partial(torch.autograd.grad, retain_graph=True)
        if name in self.own:
            return self.own[name](grad, out, self.leaves, self.dout)
        return grad(out, self.leaves, self.dout)

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """In fp64: the heads of the last key head in the last sequence."""
        q, k, v = (x[-1] for x in self.leaves)
        group = self.case.heads // self.case.kv_heads
        tensors = (q[:, -group:], k[:, -1], v[:, -1], self.dout[-1, :, -group:])
        return exact_heads(tensors, self.case.interval(self.device), self.case.head_dim**-0.5)

    def errors(self, name: str) -> dict[str, float]:
        """Relative rms error of each tensor there."""
        out = self.candidates[name](*self.leaves)
        grads = self._grads(name, out)
        group = self.case.heads // self.case.kv_heads
        found = dict(zip(NAMES, (out.detach(), *grads), strict=True))
        heads = {"out": slice(-group, None), "dq": slice(-group, None), "dk": -1, "dv": -1}
        return {n: relative_error(x[-1, :, heads[n]], self.exact[n]) for n, x in found.items()}
