"""Others' attention for a case of the GPU benchmark: torch's, FlexAttention, flash-attn."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from _gpu_case import Attend, Case
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

FLASH_ATTN = {
    "flash-attn 2": "flash_attn",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 4": "flash_attn.cute",
}
# FlexAttention is compiled anew for each case, which takes about ten seconds.
FLEX_LENGTHS = (8192, 16384, 32768)


def rivals(case: Case, device: str) -> dict[str, Attend]:
    """Whoever may take the case. Whether they do shows when they run."""
    found: dict[str, Attend] = {}
    if case.mask in ("causal", "full", "gqa"):
        if device == "cuda":
            # forced by name: torch's own choice on Hopper is FlashAttention-2
            found["sdpa flash"] = forced(case, SDPBackend.FLASH_ATTENTION)
            found["sdpa cudnn"] = forced(case, SDPBackend.CUDNN_ATTENTION)
        else:
            found["sdpa"] = sdpa(case)
    if device == "cpu" or (
        case.head_dim == 128 and case.dtype == "bf16" and case.length in FLEX_LENGTHS
    ):
        found["flex"] = flex(case, device)
    return found | dict(installed(case))


def sdpa(case: Case) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options = {"is_causal": case.is_causal, "enable_gqa": case.mask == "gqa"}
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    return attend


def forced(case: Case, backend: SDPBackend) -> Attend:
    plain = sdpa(case)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return plain(q, k, v)

    return attend


def flex(case: Case, device: str) -> Attend:
    """FlexAttention with a block mask, compiled on a GPU at its first call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    call: Any = flex_attention
    if device == "cuda":
        # its code is shared by all cases, and torch.compile gives up after a few of them
        torch._dynamo.reset()
        call = torch.compile(flex_attention, dynamic=False)
    mask = None
    if case.mask != "full":
        n = case.length
        mask = create_block_mask(mask_mod(case, device), None, None, n, n, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return call(q, k, v, block_mask=mask, enable_gqa=case.mask == "gqa").transpose(1, 2)

    return attend


def mask_mod(case: Case, device: str) -> Any:
    """Who sees whom, as FlexAttention asks for it."""
    edges = torch.tensor(case.boundaries[1:], device=device)
    document = torch.bucketize(torch.arange(case.length, device=device), edges, right=True)

    def causal(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    def window(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < case.window)

    def documents(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (document[i] == document[j])

    return {"window": window, "documents": documents}.get(case.mask, causal)


def installed(case: Case) -> Iterator[tuple[str, Attend]]:
    """flash-attn's packages, as far as they can be imported; they know no packed documents here."""
    if case.mask == "documents":
        return
    for name, module in FLASH_ATTN.items():
        try:
            function = importlib.import_module(module).flash_attn_func
        except (ImportError, AttributeError):
            continue
        options: dict[str, Any] = {"causal": case.is_causal}
        if case.mask == "window":
            options["window_size"] = (case.window - 1, 0)

        def attend(
            q: Tensor, k: Tensor, v: Tensor, call: Any = function, options: Any = options
        ) -> Tensor:
            out = call(q, k, v, **options)
            return out[0] if isinstance(out, tuple) else out

        yield name, attend
