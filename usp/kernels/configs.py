"""One table of launch configurations: device family x kernel x head dim.

The first of a row is the default: of the shapes that the literature and the size of the register
file suggest, one whose loops keep every register, as ``tests/kernels/test_triton_compile.py``
checks; what is spilled before and after them is moved once. Which of these was read from the
instructions of the loops (``usp bench machine_code``). That is a rule and no measurement: no GPU
has timed a row. The others are what ``tune.tune`` tries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from usp import kernels
from usp.kernels import tuned
from usp.kernels.hopper_configs import HOPPER, Pipeline

BUCKETS = (64, 128, 256)


@dataclass(frozen=True)
class Config:
    """How a kernel is cut and launched.

    Attributes:
        block_q, block_k: Rows of queries and keys in a tile.
        edge: Step of the masked loops, which divides that of the full one: masks take registers,
            and a finer step wastes fewer scores on a diagonal.
        num_warps, num_stages: Warps of a program, depth of the software pipeline.
        waves_per_eu: AMD: waves a SIMD should hold; 2 caps a wave at 256 registers, 1 at 512.
        matrix_instr_nonkdim: AMD: rows of an MFMA.
    """

    block_q: int
    block_k: int
    edge: int
    num_warps: int = 4
    num_stages: int = 1
    waves_per_eu: int = 0
    matrix_instr_nonkdim: int = 0

    def launch(self, num_xcds: int = 1) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        found = {name: value for name, value in asdict(self).items() if value}
        for name in ("block_q", "block_k", "edge"):
            found[name.upper()] = found.pop(name)
        return found | {"NUM_XCDS": num_xcds, "enable_fp_fusion": True}


AnyConfig = Config | Pipeline


def _amd(block_q: int, block_k: int, edge: int, num_warps: int, waves: int) -> Config:
    # 16-row MFMA: half the accumulator registers of 32 in flight. One stage: LDS is 64 KiB.
    return Config(block_q, block_k, edge, num_warps, 1, waves, 16)


_Rows = dict[int, tuple[Config, ...]]
# A warpgroup's wgmma takes 64 rows, two of them 128. One warpgroup in each of two programs on a
# multiprocessor covers the softmax of the other, which two that wait for each other do not. Two
# stages hide loads, a third where shared memory (227 KiB) has room.
_SM_90: dict[str, _Rows] = {
    "forward": {
        64: (Config(128, 64, 64, 4, 3), Config(128, 128, 64, 8, 3), Config(128, 64, 64, 8, 3)),
        128: (Config(128, 64, 64, 8, 3), Config(128, 128, 64, 8, 2), Config(128, 64, 32, 8, 2)),
        256: (Config(64, 64, 32, 8, 2), Config(64, 32, 32, 4, 2)),
    },
    "backward_keys": {
        64: (Config(64, 128, 64, 8, 2), Config(64, 64, 32, 4, 2), Config(64, 128, 32, 8, 2)),
        # 64 keys are the rows of one warpgroup alone: both would compute the same scores
        128: (Config(64, 128, 32, 8, 2), Config(64, 128, 16, 8, 2), Config(64, 64, 32, 8, 2)),
        # 64 keys, which wgmma wants, would spill: mma.sync
        256: (Config(64, 32, 16, 8, 2), Config(32, 32, 32, 8, 2)),
    },
    "backward_queries": {
        64: (Config(64, 128, 64, 4, 2), Config(128, 128, 64, 8, 2), Config(128, 64, 64, 8, 3)),
        128: (Config(64, 64, 64, 4, 2), Config(128, 64, 64, 8, 2)),
        256: (Config(64, 32, 32, 8, 2),),
    },
    "bias_gradient": {
        64: (Config(64, 64, 64, 4, 1),),
        128: (Config(64, 64, 64, 8, 1),),
        # 32 rows would take mma.sync, and spill
        256: (Config(64, 32, 32, 8, 1),),
    },
}
# mma.sync keeps its left operand in registers: smaller tiles of keys than with wgmma. What it reads
# from shared memory serves the rows of a warp, so that 32 of them take half the reads of 16.
_SM_80: dict[str, _Rows] = {
    "forward": {
        64: (Config(128, 64, 32, 4, 2), Config(128, 128, 32, 8, 2), Config(128, 64, 64, 8, 3)),
        128: (Config(128, 32, 16, 4, 2), Config(128, 32, 32, 8, 3), Config(128, 64, 32, 8, 3)),
        # with Triton 3.6 larger steps keep 24 to 40 bytes in local memory, backward 8
        256: (Config(64, 32, 16, 8, 2), Config(64, 64, 32, 8, 2)),
    },
    "backward_keys": {
        64: (Config(64, 128, 32, 8, 2), Config(64, 64, 32, 8, 2)),
        128: (Config(64, 64, 32, 8, 2), Config(32, 64, 32, 8, 2)),
        256: (Config(32, 16, 16, 8, 1), Config(32, 32, 16, 8, 1)),
    },
    "backward_queries": {
        64: (Config(128, 32, 32, 4, 2), Config(128, 64, 32, 8, 2), Config(128, 32, 32, 8, 2)),
        128: (Config(64, 64, 32, 4, 2), Config(128, 32, 32, 8, 2), Config(64, 64, 32, 8, 2)),
        256: (Config(64, 64, 32, 8, 1), Config(64, 32, 32, 8, 2)),
    },
    "bias_gradient": _SM_90["bias_gradient"]
    | {128: (Config(64, 32, 32, 8, 1),), 256: (Config(32, 16, 16, 8, 1),)},
}
# Four waves fill a compute unit once; wide tiles take the whole register file (one wave a SIMD).
_GFX942: dict[str, _Rows] = {
    "forward": {
        64: (_amd(128, 64, 64, 4, waves=2), _amd(128, 32, 32, 4, waves=2)),
        128: (_amd(128, 32, 32, 4, waves=2), _amd(128, 64, 32, 4, waves=1)),
        256: (_amd(64, 64, 32, 4, waves=1), _amd(64, 32, 32, 4, waves=1)),
    },
    "backward_keys": {
        64: (_amd(64, 128, 32, 4, waves=1), _amd(64, 64, 32, 4, waves=2)),
        128: (_amd(64, 64, 32, 4, waves=1), _amd(32, 64, 32, 4, waves=1)),
        256: (_amd(32, 64, 32, 4, waves=1), _amd(32, 32, 32, 4, waves=1)),
    },
    "backward_queries": {
        64: (_amd(128, 64, 32, 4, waves=2), _amd(128, 32, 32, 4, waves=2)),
        128: (_amd(128, 32, 32, 4, waves=1), _amd(64, 32, 32, 4, waves=2)),
        256: (_amd(64, 32, 32, 4, waves=1),),
    },
    "bias_gradient": {
        64: (_amd(64, 64, 64, 4, waves=2),),
        128: (_amd(64, 32, 32, 4, waves=1),),
        256: (_amd(32, 32, 32, 4, waves=1),),
    },
}
# Fewer registers are left over on gfx90a, whose bf16 MFMA is half as deep: smaller tiles at 256.
_GFX90A: dict[str, _Rows] = {
    **_GFX942,
    "forward": _GFX942["forward"] | {256: (_amd(64, 32, 32, 4, waves=1),)},
    "backward_keys": _GFX942["backward_keys"] | {256: (_amd(32, 32, 32, 4, waves=1),)},
}
# Any other GPU: sm_80's shapes as far as 99 KiB of shared memory take them.
_DEFAULT: dict[str, _Rows] = {
    "forward": {
        64: (Config(128, 64, 32, 8, 2),),
        128: (Config(128, 32, 32, 8, 2),),
        256: (Config(64, 32, 32, 8, 1),),
    },
    "backward_keys": {
        64: (Config(32, 64, 32, 8, 2),),
        128: (Config(32, 64, 32, 8, 2),),
        256: (Config(32, 32, 16, 8, 1),),
    },
    "backward_queries": {
        64: (Config(128, 32, 32, 8, 2),),
        128: (Config(64, 32, 32, 8, 2),),
        256: (Config(32, 32, 32, 8, 1),),
    },
    "bias_gradient": {
        64: (Config(64, 64, 64, 8, 1),),
        128: (Config(32, 32, 32, 8, 1),),
        256: (Config(32, 32, 32, 8, 1),),
    },
}
TABLE: dict[str, dict[str, _Rows]] = {
    "sm_80": _SM_80,
    "sm_90": _SM_90,
    "gfx90a": _GFX90A,
    "gfx942": _GFX942,
    "default": _DEFAULT,
}
# fp32 products at full precision take no matrix instruction on NVIDIA, and rows of registers.
EXACT = Config(16, 16, 16)
# In the interpreter a tile costs the same whatever its size: small ones, so that tests have many.
INTERPRETED = Config(32, 32, 16)
# Chiplets that programs are dealt out over in turn.
NUM_XCDS = {"gfx942": 8}


def bucket(head_dim: int) -> int:
    return next(size for size in BUCKETS if head_dim <= size)


def wanted(kernel: str, head_dim: int, like: Tensor) -> Iterator[AnyConfig]:
    """How to launch a kernel of ``TABLE`` on the device and in the dtype of a tensor.

    Returns:
        What was asked for, what tuning has found, the Hopper kernel where it was found right, and
        the default, a ``Config``, which takes every call. The first that takes a call is to be
        taken.
    """
    if kernels.interpreted():
        yield INTERPRETED
        return
    size = bucket(head_dim)
    asked = _asked[kernel](size) if kernel in _asked else None
    if isinstance(asked, Config) or (asked is not None and family(like.device) == "sm_90"):
        yield asked
    *won, default = _known(kernel, size, like.dtype == torch.float32, like.device)
    yield from won
    if (like.device, like.dtype, head_dim) in _found_right and kernel in HOPPER:
        yield from HOPPER[kernel].get(size, ())[:1]
    yield default


@cache
def _known(kernel: str, size: int, exact: bool, device: torch.device) -> tuple[AnyConfig, ...]:
    if exact:
        return (EXACT,)
    won, default = _won(kernel, size, device), TABLE[family(device)][kernel][size][0]
    return (default,) if won is None else (won, default)


@cache
def launch(config: Config, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch on a device."""
    return config.launch(NUM_XCDS.get(family(device), 1))


@cache
def _won(kernel: str, size: int, device: torch.device) -> AnyConfig | None:
    """What tuning has found for this device, if it still is one to choose from.

    Another version of usp may have written it.
    """
    found = tuned.recall(device_name(device), kernel, size)
    if found is None:
        return None
    return next((c for c in candidates(kernel, size, device) if asdict(c) == found), None)


def config_of(found: dict[str, Any]) -> AnyConfig:
    """The one that ``asdict`` has taken apart."""
    return Config(**found) if "edge" in found else Pipeline(**found)


def candidates(kernel: str, head_dim: int, device: torch.device) -> tuple[AnyConfig, ...]:
    """What tuning chooses from."""
    found, size = family(device), bucket(head_dim)
    pipelines = HOPPER.get(kernel, {}).get(size, ())
    if found != "sm_90" or not pipelines or not kernels.has_gluon():
        return TABLE[found][kernel][size]
    return TABLE[found][kernel][size] + pipelines


# Where the Hopper kernels come before the portable ones: device, dtype and the wider head dim.
_found_right: set[tuple[torch.device, torch.dtype, int]] = set()


def prefer_pipelines(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """From now on the Hopper kernels do what they can, where tuning has found nothing else.

    For whoever has found them right there.

    Args:
        head_dim: The wider one of q's and v's.
    """
    _found_right.add((device, dtype, head_dim))


# By kernel, what is asked for at a size: set in ``trying`` and ``pipelined`` alone. Not a context
# variable: autograd runs the backward of a GPU in a thread of its own.
_asked: dict[str, Callable[[int], AnyConfig | None]] = {}


@contextmanager
def _asking(asked: dict[str, Callable[[int], AnyConfig | None]]) -> Iterator[None]:
    before = _asked.copy()
    _asked.update(asked)
    try:
        yield
    finally:
        _asked.clear()
        _asked.update(before)


def pipelined() -> AbstractContextManager[None]:
    """In here the Hopper kernels do what they can."""
    return _asking({kernel: partial(_pipeline, kernel) for kernel in HOPPER})


def _pipeline(kernel: str, size: int) -> Pipeline | None:
    return next(iter(HOPPER[kernel].get(size, ())), None)


def trying(kernel: str, config: AnyConfig) -> AbstractContextManager[None]:
    """In here a kernel is launched so, on every device."""
    return _asking({kernel: lambda size: config})


def forget() -> None:
    """Look up anew what was tuned."""
    _won.cache_clear()
    _known.cache_clear()
    launch.cache_clear()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def family(device: torch.device) -> str:
    """The row of ``TABLE`` for a GPU."""
    name = kernels.architecture(device)
    # gfx950 is gfx942 with more of everything
    name = "gfx942" if name == "gfx950" else name
    return name if name in TABLE else "default"
