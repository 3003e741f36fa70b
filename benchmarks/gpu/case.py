"""Local attention of the GPU benchmark, by usp and by whoever is there."""

from __future__ import annotations

from usp.backends.library import LIBRARIES
from usp.bench import attention
from usp.bench.attention import Attend, Own
from usp.bench.case import Case
from usp.bench.device import DTYPES
from usp.bench.rivals import rivals

# gqa: causal, GROUP query heads for a key head. window and documents are causal, too.
MASKS = ("causal", "full", "gqa", "window", "documents")
GROUP = 8
# FlexAttention is compiled anew for each case, which takes about ten seconds.
FLEX_LENGTHS = (8192, 16384, 32768)


def local_case(
    dtype: str,
    head_dim: int,
    length: int,
    mask: str,
    tokens: int = 16384,
    width: int = 2048,
    window: int = 1024,
) -> Case:
    """``tokens`` in all, cut into sequences of ``length``; ``width`` = heads x head_dim."""
    heads = width // head_dim
    kv_heads = max(1, heads // GROUP) if mask == "gqa" else heads
    batch = max(1, tokens // length)
    return Case(dtype, batch, length, heads, kv_heads, head_dim, mask, window)


def key_of(case: Case) -> str:
    return f"local {case.mask} {case.dtype} {case.head_dim} {case.length}"


def own(dtype: str, head_dim: int, device: str) -> dict[str, Own]:
    """usp's kernels and its adapters to libraries, not to torch's own call."""
    found = attention.own(DTYPES[dtype], head_dim, device)
    return {
        name: each
        for name, each in found.items()
        if each.backend.NAME != "reference"
        and (each.backend.CARRIES_STATE or each.backend in LIBRARIES)
    }


def others(case: Case, device: str) -> dict[str, Attend]:
    """Whoever may take the case. Whether they do shows when they run."""
    flex = case.head_dim == 128 and case.dtype == "bf16" and case.length in FLEX_LENGTHS
    return rivals(case, device, flex or device == "cpu", compiled=device == "cuda")
