"""flash-attn 3, by the names of its ops: their Python wrappers changed, the names did not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from usp.backends.library.call import How, Missing, deterministic, is_there

UNBOUNDED = -1
_INSTALL = "build it from the folder hopper of github.com/Dao-AILab/flash-attention"


@dataclass(frozen=True)
class Flash3:
    """The ops, or functions of their names and defaults.

    Attributes:
        fwd, bwd: They take all but tensors by keyword.
        causal: What ``fwd`` calls the argument that ``bwd`` calls is_causal.
    """

    fwd: Callable[..., Any]
    bwd: Callable[..., Any]
    causal: str = "is_causal"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> tuple[Tensor, Tensor]:
        options = {self.causal: how.causal, "num_splits": 1, **_options(how)}
        out, lse = self.fwd(q, k, v, **options)[:2]
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        how: How,
        dlse: Tensor | None,
    ) -> Sequence[Tensor]:
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        # not with head dim 256
        fixed = deterministic() and q.shape[-1] < 256
        options = {"is_causal": how.causal, "deterministic": fixed, **_options(how)}
        # what it returns has differed from version to version
        self.bwd(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **options)
        return dq, dk, dv


def _options(how: How) -> dict[str, Any]:
    left, right = how.window(UNBOUNDED)
    options: dict[str, Any] = {
        "softmax_scale": how.scale,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": how.softcap,
    }
    if how.packed is not None:
        options |= {
            "cu_seqlens_q": how.packed.cu_q,
            "cu_seqlens_k": how.packed.cu_k,
            "max_seqlen_q": how.packed.max_q,
            "max_seqlen_k": how.packed.max_k,
        }
    return options


def missing() -> str | None:
    if not is_there("flash_attn_interface"):
        return f"flash-attn 3 (flash_attn_interface) is not installed: {_INSTALL}"
    return None


def load() -> Flash3:
    import flash_attn_interface  # noqa: F401  registers the ops

    for name, tensors in (("fwd", 3), ("bwd", 6)):
        if not hasattr(torch.ops.flash_attn_3, name):
            raise Missing(f"flash_attn_interface brought no op flash_attn_3::{name}: {_INSTALL}")
        arguments = getattr(torch.ops.flash_attn_3, name).default._schema.arguments
        wanted = [x.name for x in arguments[tensors:] if not x.has_default_value()]
        if wanted:
            raise Missing(
                f"flash_attn_3::{name} wants {', '.join(wanted)}, which have defaults since July "
                f"2025: {_INSTALL}"
            )
    return Flash3(torch.ops.flash_attn_3.fwd, torch.ops.flash_attn_3.bwd)


def of_functions(functions: Any, where: str) -> Flash3:
    """The Python functions of late versions, where the ops have another name.

    Raises:
        Missing: they are of an early version, or none.
    """
    for name in ("_flash_attn_forward", "_flash_attn_backward"):
        function = getattr(functions, name, None)
        # torch's custom ops hold what they were made of
        plain = getattr(function, "_init_fn", function)
        if plain is None or "window_size_left" not in inspect.signature(plain).parameters:
            raise Missing(f"{where} has no {name} with window_size_left: it is not flash-attn 3's")
    return Flash3(functions._flash_attn_forward, functions._flash_attn_backward, "causal")
