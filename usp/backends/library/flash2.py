"""The calling convention of flash-attn 2, which the hub's builds and AMD's aiter share.

Four private functions of ``flash_attn.flash_attn_interface``, which every ring outside of that
library calls, with the signatures that they have had since 2.7; in 2.6 a window is a pair, and
there are eight results.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from usp.backends.library.call import How, Missing, deterministic, is_there, version_of

OLDEST = (2, 6)  # earlier ones have no softcap, and pad the LSE of packed calls
OLDEST_ON_AMD = (2, 7)  # composable kernels pad that LSE before
BY_AITER = (2, 8, 4)  # from here on its Triton kernels for AMD are those of aiter
UNBOUNDED = -1
NAMES = ("_flash_attn_forward", "_flash_attn_backward")
PACKED_NAMES = ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward")
_INSTALL = "pip install flash-attn --no-build-isolation"


@dataclass(frozen=True)
class Flash2:
    """``functions`` holds them under their names: a module.

    Attributes:
        pairs: Whether they take a window as a pair, as in 2.6.
    """

    functions: Any
    pairs: bool = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> tuple[Tensor, Tensor]:
        name, where = _chosen(how, 0)
        call = getattr(self.functions, name)
        # dropout_p, scale, causal, left, right, softcap, alibi_slopes, return_softmax
        found = call(q, k, v, *where, 0.0, *self._scores(how), None, False)
        # out, q, k, v, padded out, lse and two of dropout in 2.6
        return found[0], found[5 if len(found) == 8 else 1]

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
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        name, where = _chosen(how, 1)
        # they take the random state of dropout as their last, and have a default for it
        getattr(self.functions, name)(
            dout, q, k, v, out, lse, *grads, *where, 0.0, *self._scores(how), None, deterministic()
        )
        return grads

    def _scores(self, how: How) -> tuple[Any, ...]:
        window = how.window(UNBOUNDED)
        return how.scale, how.causal, *((window,) if self.pairs else window), how.softcap


def _chosen(how: How, which: int) -> tuple[str, tuple[Any, ...]]:
    """A function's name, and where its sequences lie."""
    if how.packed is None:
        return NAMES[which], ()
    packed = how.packed
    return PACKED_NAMES[which], (packed.cu_q, packed.cu_k, packed.max_q, packed.max_k)


def missing(oldest: tuple[int, ...] = OLDEST) -> str | None:
    """Why flash-attn 2 is not installed. flash-attn 4 alone makes a ``flash_attn`` too."""
    version = version_of("flash-attn")
    if version is None:
        return f"flash-attn is not installed: {_INSTALL}"
    if version < oldest:
        wanted, found = (".".join(map(str, x)) for x in (oldest, version))
        return f"flash-attn is {found}, and from {wanted} on it has the functions that are called"
    return None


def missing_on_amd() -> str | None:
    return missing(OLDEST_ON_AMD)


def load_cuda() -> Flash2:
    """Its CUDA kernels, or those of composable kernels where torch is built for ROCm."""
    if not is_there("flash_attn_2_cuda"):
        raise Missing(f"flash-attn is there without its compiled extension: {_INSTALL}")
    if asks_for_triton():
        raise Missing("FLASH_ATTENTION_TRITON_AMD_ENABLE asks flash-attn for its Triton kernels")
    return interface()


def load_triton() -> Flash2:
    """Its own Triton kernels for AMD: asked for by its switch, or all that there is."""
    _refuse_compiled()
    if _by_aiter():
        raise Missing("this flash-attn asks aiter for its Triton kernels")
    return interface()


def load_by_aiter() -> Flash2:
    """The same of later versions, which ask aiter for them."""
    _refuse_compiled()
    if not _by_aiter():
        raise Missing("this flash-attn has Triton kernels of its own")
    return interface()


def _refuse_compiled() -> None:
    if not asks_for_triton() and is_there("flash_attn_2_cuda"):
        raise Missing("flash-attn has its composable kernels here")


def _by_aiter() -> bool:
    return (version_of("flash-attn") or OLDEST) >= BY_AITER


def asks_for_triton() -> bool:
    """Its own switch, which it reads when it is imported."""
    return os.environ.get("FLASH_ATTENTION_TRITON_AMD_ENABLE", "FALSE") == "TRUE"


def interface() -> Flash2:
    from flash_attn import flash_attn_interface

    return checked(flash_attn_interface, "flash_attn.flash_attn_interface")


def checked(functions: Any, where: str) -> Flash2:
    """Refuses what lacks a function.

    Raises:
        Missing: names those.
    """
    absent = [name for name in (*NAMES, *PACKED_NAMES) if not hasattr(functions, name)]
    if absent:
        raise Missing(f"{where} has no {', '.join(absent)}")
    # torch's custom ops hold what they were made of
    forward = getattr(functions, NAMES[0])
    told = inspect.signature(getattr(forward, "_init_fn", forward)).parameters
    return Flash2(functions, "window_size" in told)
