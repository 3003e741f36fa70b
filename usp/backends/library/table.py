"""What is known of each library's kernels: the one table.

Nobody has run a line of it on a GPU. What its adapters were executed on stands in ``shown``.
``windows`` is left out where some release computes them wrongly or ignores them.
"""

from __future__ import annotations

from functools import cache
from math import inf

import torch

from usp.backends.library import aiter, aten, flash2, flash3, flash4
from usp.backends.library.record import (
    HALVES,
    Record,
    any_dims,
    dims_by_architecture,
    equal_dims,
)

_SM80_ON = (r"sm_8\d", r"sm_9\d", r"sm_1\d\d")
_CDNA = ("gfx90a", "gfx942", "gfx950")
_RDNA = (r"gfx11\d\d", r"gfx12\d\d")

FLASH_ATTN = Record(
    name="flash_attn",
    title="flash-attn 2",
    missing=flash2.missing,
    load=flash2.load_cuda,
    architectures=_SM80_ON,
    dims=equal_dims(8, 256),
    built_for="cuda",
    windows=True,
    softcap=True,
    packed="hn",
    empty_lse=(inf,),
    shown="its Python over a stand-in for its extension",
)

ROWS = (
    FLASH_ATTN,
    Record(
        name="flash_attn",
        title="flash-attn 2 (composable kernels)",
        missing=flash2.missing_on_amd,
        load=flash2.load_cuda,
        architectures=(*_CDNA, *_RDNA),
        dims=equal_dims(8, 256),
        built_for="hip",
        windows=True,
        packed="hn",
        shown="its Python over a stand-in for its extension",
    ),
    # takes a window or a softcap, and ignores it
    Record(
        name="flash_attn",
        title="flash-attn 2 (Triton)",
        missing=flash2.missing_on_amd,
        load=flash2.load_triton,
        architectures=(*_CDNA, *_RDNA),
        dims=equal_dims(8, 256),
        built_for="hip",
        packed="nh",
        empty_lse=(0.0,),
        shown="all of 2.8.3 in Triton's interpreter",
    ),
    Record(
        name="flash_attn",
        title="flash-attn 2 (by aiter)",
        missing=flash2.missing_on_amd,
        load=flash2.load_by_aiter,
        architectures=(*_CDNA, *_RDNA),
        dims=equal_dims(8, 256),
        built_for="hip",
        packed="hn",
        empty_lse=(-inf,),
        shown="its Python over a stand-in for its extension",
    ),
    Record(
        name="flash_attn_3",
        title="flash-attn 3",
        missing=flash3.missing,
        load=flash3.load,
        architectures=("sm_90",),
        dims=equal_dims(8, 256),
        built_for="cuda",
        windows=True,
        softcap=True,
        packed="hn",
        empty_lse=(-inf, inf),
        shown="its ops' schema, over a stand-in",
    ),
    Record(
        name="flash_attn_4",
        title="flash-attn 4",
        missing=flash4.missing,
        load=flash4.load,
        architectures=("sm_90", "sm_100", "sm_103"),
        # with 256 on sm_100 it takes no dlse and no softcap
        dims=dims_by_architecture(
            {"sm_90": 256, "sm_100": 128, "sm_103": 128},
            {"sm_100": ((192, 128),), "sm_103": ((192, 128),)},
        ),
        built_for="cuda",
        windows=True,
        softcap=True,
        dlse=True,
        packed="hn",
        empty_lse=(-inf,),
        shown="its signature, over a stand-in; its kernels compiled, not executed",
    ),
    # releases differ in windows, which they take and some compute wrongly
    Record(
        name="aiter",
        title="aiter (Triton)",
        missing=aiter.missing,
        load=aiter.load,
        architectures=(*_CDNA, *_RDNA),
        dims=equal_dims(8, 256),
        built_for="hip",
        packed="hn",
        empty_lse=(0.0, -inf),
        shown="all of 0.1.7 in Triton's interpreter",
    ),
    Record(
        name="aten_flash",
        title="torch's flash attention",
        missing=aten.missing,
        load=aten.loader(aten.Flash, "_flash_attention_forward", "_flash_attention_backward"),
        architectures=_SM80_ON,
        dims=equal_dims(8, 256),
        built_for="cuda",
        windows=True,
        packed="hn",
        empty_lse=(inf,),
        shown="torch's schema and shapes, over a stand-in",
    ),
    # AOTriton: a window is ignored by old ones, and causal counts from the top left corner
    Record(
        name="aten_flash",
        title="torch's flash attention (AOTriton)",
        missing=aten.missing,
        load=aten.loader(aten.Flash, "_flash_attention_forward", "_flash_attention_backward"),
        architectures=(*_CDNA, *_RDNA),
        dims=equal_dims(8, 256),
        built_for="hip",
        shown="torch's schema and shapes, over a stand-in",
    ),
    Record(
        name="aten_cudnn",
        title="torch's cuDNN attention",
        missing=aten.missing,
        load=aten.loader(
            aten.Cudnn,
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_cudnn_attention_backward",
        ),
        architectures=_SM80_ON,
        dims=any_dims(8, 128),
        built_for="cuda",
        shared_heads=False,
        lse="(B, H, n, 1)",
        shown="torch's schema and shapes, over a stand-in",
    ),
    Record(
        name="aten_efficient",
        title="torch's memory-efficient attention",
        missing=aten.missing,
        load=aten.loader(
            aten.Efficient, "_efficient_attention_forward", "_efficient_attention_backward"
        ),
        architectures=(*_SM80_ON, *_CDNA, *_RDNA),
        dims=any_dims(8, 256),
        dtypes=(*HALVES, torch.float32),
        shared_heads=False,
        lse="(B, H, n to 32s)",
        shown="torch's schema, over a stand-in",
    ),
)

_HOPPER_ON = (
    "flash_attn_4",
    "flash_attn_3",
    "aten_cudnn",
    "aten_flash",
    "flash_attn",
    "aten_efficient",
)

# Which to trust first, by the start of an architecture's name: what their makers say of speed, a
# guess here. Those that are not there, or do not take a problem, are passed over.
TRUSTED: dict[str, tuple[str, ...]] = {
    "sm_8": ("flash_attn", "aten_flash", "aten_cudnn", "aten_efficient"),
    "sm_9": _HOPPER_ON,
    "sm_1": _HOPPER_ON,
    "gfx": ("flash_attn", "aiter", "aten_flash", "aten_efficient"),
}


@cache
def trusted(architecture: str) -> tuple[str, ...]:
    """Names of libraries for an architecture ("sm_90", "gfx942"), the most trusted first."""
    for start, names in TRUSTED.items():
        if architecture.startswith(start):
            return names
    return ()
