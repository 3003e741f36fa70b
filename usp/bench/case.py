"""A case of attention, and the grids that have names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

MASKS = ("full", "causal", "window", "documents")
DOCUMENT_CUTS = (0, 1, 3, 4, 8, 9, 13, 15, 16)  # sixteenths of a sequence: uneven, as packed ones
FLOPS = {"forward": 4.0, "backward": 10.0, "both": 14.0}  # of a visible pair, head and head dim


@dataclass(frozen=True)
class Case:
    """Attention of ``batch`` sequences; ``window`` and ``documents`` are causal, too."""

    dtype: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    mask: str
    window: int = 1024

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}" if self.kv_heads != self.heads else f"{self.heads}"
        return f"{self.dtype} {self.batch} x {self.length} x {heads} x {self.head_dim} {self.mask}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.length, self.heads, self.head_dim

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

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
        return FLOPS[which] * self.batch * self.heads * self.pairs * self.head_dim

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

    def dense(self, device: str) -> Tensor | None:
        """(L, L) bool, True where a query sees a key; None for all."""
        ends = self.interval(device)
        if ends is None:
            return None
        keys = torch.arange(self.length, device=device)
        return (keys >= ends[0][:, None]) & (keys < ends[1][:, None])

    def within(self, flops: float) -> Case | None:
        """The same with fewer samples, then heads, so that a backward stays within ``flops``."""
        case = self
        while case.flops("backward") > flops:
            if case.batch > 1:
                case = replace(case, batch=case.batch // 2)
            elif case.kv_heads > 1:
                kv_heads = case.kv_heads // 2
                case = replace(case, heads=kv_heads * case.group, kv_heads=kv_heads)
            elif case.heads > 1:
                case = replace(case, heads=case.heads // 2)
            else:
                return None
        return case

    def named(self) -> dict[str, Any]:
        """What tells it from others, for a record."""
        fields = asdict(self)
        if self.mask != "window":
            del fields["window"]
        return fields


# (batch, tokens, heads, key heads, head dim, mask) and whose shape it is.
Row = tuple[int, int, int, int, int, str]
VIT: tuple[Row, ...] = (
    (16, 197, 12, 12, 64, "full"),  # ViT-B/16 at 224 pixels
    (8, 577, 16, 16, 64, "full"),  # ViT-L/16 at 384
    (8, 729, 16, 16, 72, "full"),  # SigLIP so400m/14 at 384
    (4, 1025, 16, 16, 64, "full"),  # ViT-L/14 at 448
    (1, 4097, 12, 12, 64, "full"),  # ViT-B/16 at 1024
    (1, 16385, 12, 12, 64, "full"),  # ViT-B/16 at 2048
)
LLM: tuple[Row, ...] = (
    (4, 2048, 32, 8, 128, "causal"),  # Llama 3 8B
    (1, 8192, 32, 8, 128, "causal"),
    (1, 8192, 32, 8, 128, "documents"),
    (1, 16384, 32, 8, 128, "window"),  # Mistral, with a window of 1024
    (1, 32768, 32, 8, 128, "causal"),
    (2, 4096, 14, 2, 64, "causal"),  # Qwen2.5 0.5B
)
DIT: tuple[Row, ...] = (
    (8, 256, 16, 16, 72, "full"),  # DiT-XL/2 at 256 pixels
    (4, 1024, 16, 16, 72, "full"),  # at 512
    (1, 4608, 24, 24, 128, "full"),  # FLUX.1 at 1024, text of 512
    (1, 17776, 48, 48, 64, "full"),  # CogVideoX 5B, 49 frames of 480 x 720
    (1, 32760, 12, 12, 128, "full"),  # Wan 2.1 1.3B, 81 frames of 480 x 832
)
GRIDS: dict[str, tuple[Row, ...]] = {
    "vit": VIT,
    "llm": LLM,
    "dit": DIT,
    # the published measurements of FlashAttention-2 (arXiv:2307.08691): 16k tokens, width 2048
    "flash-attn": tuple(
        (16384 // length, length, 2048 // head_dim, 2048 // head_dim, head_dim, mask)
        for length in (512, 1024, 2048, 4096, 8192, 16384)
        for head_dim in (64, 128)
        for mask in ("full", "causal")
    ),
    # so little that the call itself is measured, in Python and in torch
    "call": ((1, 8, 2, 2, 16, "full"), (1, 8, 2, 2, 16, "causal")),
    "tiny": ((1, 96, 4, 2, 16, "causal"), (2, 65, 3, 3, 16, "full")),
}


def grid(name: str, dtypes: list[str]) -> Iterator[Case]:
    """The cases of a grid, of every dtype."""
    for dtype, row in itertools.product(dtypes, GRIDS[name]):
        yield Case(dtype, *row)
