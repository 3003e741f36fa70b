"""Others' attention on one device: torch's own, FlexAttention, flash-attn's packages."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from usp.bench.attention import Attend
from usp.bench.case import Case

FLASH_ATTN = {
    "flash-attn 2": "flash_attn",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 4": "flash_attn.cute",
}
# Forced by name on a GPU: torch's own choice on Hopper is FlashAttention-2.
FORCED = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}


def rivals(case: Case, device: str, flex: bool, compiled: bool = True) -> dict[str, Attend]:
    """Whoever may take the case. Whether they do shows when they run.

    Args:
        flex: Whether FlexAttention too.
        compiled: Whether it is compiled, which takes ten seconds a case.
    """
    found: dict[str, Attend] = {}
    if device == "cpu":
        found["sdpa"] = sdpa(case, device)
    elif case.mask in ("causal", "full", "gqa"):
        found |= {name: forced(case, device, backend) for name, backend in FORCED.items()}
    if flex:
        found["flex"] = flex_attention(case, device, compiled)
    return found | dict(installed(case))


def not_installed(device: str, flex: bool) -> dict[str, str]:
    """Who is left out of all cases of a run, and why."""
    found = {} if flex else {"flex": "it compiles for each case: name it in --candidates"}
    for name, module in FLASH_ATTN.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            found[name] = str(error)
    if device == "cpu":
        found |= dict.fromkeys(FORCED, "it is for GPUs")
    return found


def sdpa(case: Case, device: str) -> Attend:
    """torch's scaled_dot_product_attention; windows and documents as a boolean matrix."""
    options: dict[str, Any] = {"enable_gqa": case.group > 1}
    if case.mask in ("window", "documents"):
        options["attn_mask"] = case.dense(device)
    else:
        options["is_causal"] = case.is_causal

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    return attend


def forced(case: Case, device: str, backend: SDPBackend) -> Attend:
    plain = sdpa(case, device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return plain(q, k, v)

    return attend


def flex_attention(case: Case, device: str, compiled: bool = True) -> Attend:
    """FlexAttention with a block mask, compiled at its first call."""
    from torch.nn.attention import flex_attention as flex

    call: Any = flex.flex_attention
    if compiled:
        # its code is shared by all cases, and torch.compile gives up after a few of them
        torch._dynamo.reset()
        call = torch.compile(flex.flex_attention, dynamic=False)
    mask = None
    if case.mask != "full":
        n = case.length
        mask = flex.create_block_mask(mask_mod(case, device), None, None, n, n, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = call(q, k, v, block_mask=mask, enable_gqa=case.group > 1)
        return out.transpose(1, 2)

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
            found: Tensor = out[0] if isinstance(out, tuple) else out
            return found

        yield name, attend
