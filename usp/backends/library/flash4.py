"""flash-attn 4 (``flash_attn.cute``), whose kernels are compiled at their first call.

Always by keyword: the fourth of its positional arguments is another value. Here None is no bound,
and -1 is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from usp.backends.library.call import How, Missing, deterministic, version_of

OLDEST = (4, 0, 0)
_INSTALL = "pip install flash-attn-4"


@dataclass(frozen=True)
class Flash4:
    """``functions`` is the module ``flash_attn.cute.interface``."""

    functions: Any

    def forward(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> tuple[Tensor, Tensor]:
        # two results in early versions, five in late ones
        out, lse = self.functions._flash_attn_fwd(q, k, v, return_lse=True, **_options(how))[:2]
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
        options = _options(how) | {"deterministic": deterministic()}
        if dlse is not None:
            options["dlse"] = dlse
        backward = self.functions._flash_attn_bwd
        found: Sequence[Tensor] = backward(q=q, k=k, v=v, out=out, dout=dout, lse=lse, **options)
        return found[:3]


def _options(how: How) -> dict[str, Any]:
    left, right = how.window(None)
    options: dict[str, Any] = {
        "softmax_scale": how.scale,
        "causal": how.causal,
        "window_size_left": left,
        "window_size_right": right,
    }
    if how.softcap:
        options["softcap"] = how.softcap
    if how.packed is not None:
        options |= {
            "cu_seqlens_q": how.packed.cu_q,
            "cu_seqlens_k": how.packed.cu_k,
            "max_seqlen_q": how.packed.max_q,
            "max_seqlen_k": how.packed.max_k,
        }
    return options


def missing() -> str | None:
    """By its distribution: flash-attn 2.8 ships an old ``flash_attn.cute`` of its own."""
    version = version_of("flash-attn-4")
    if version is None:
        return f"flash-attn-4 is not installed: {_INSTALL}"
    if version < OLDEST:
        found = ".".join(map(str, version))
        return f"flash-attn-4 is {found}, and 4.0.0b5 or newer is wanted: {_INSTALL}"
    return None


def load() -> Flash4:
    import inspect

    from flash_attn.cute import interface

    for name in ("_flash_attn_fwd", "_flash_attn_bwd"):
        if not hasattr(interface, name):
            raise Missing(
                f"flash_attn.cute.interface has no {name}: is it that of an older flash-attn "
                f"beside flash-attn-4? ({interface.__file__})"
            )
    if "dlse" not in inspect.signature(interface._flash_attn_bwd).parameters:
        raise Missing(f"flash_attn.cute takes no dlse: {_INSTALL}==4.0.0b5 or newer")
    return Flash4(interface)
