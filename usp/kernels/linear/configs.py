"""How the kernels of linear attention are cut and launched: device family x kernel x channels.

A rule and no measurement, as in ``usp.kernels.configs``: no loop of any of these spills
(``tests/kernels/test_triton_compile.py``), and results are as wide as registers let them be, for
each program works out the scores of its chunk anew. No GPU has timed a row.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from usp import kernels
from usp.kernels import configs


@dataclass(frozen=True)
class Config:
    """How a kernel is cut and launched.

    Attributes:
        block_x: Channels that are summed over at a time; of states, rows of a tile.
        block_e: Channels of the result that a program computes.
        num_warps, num_stages, waves_per_eu, matrix_instr_nonkdim: As in ``configs.Config``.
    """

    block_x: int
    block_e: int
    num_warps: int = 4
    num_stages: int = 1
    waves_per_eu: int = 0
    matrix_instr_nonkdim: int = 0


def _amd(block_x: int, block_e: int, num_warps: int = 4, waves: int = 1) -> Config:
    return Config(block_x, block_e, num_warps, 1, waves, 16)


# Tokens of a chunk: the scores of one are a tile. Exact products of fp32 take rows of registers.
CHUNK, EXACT_CHUNK, INTERPRETED_CHUNK = 64, 32, 16
# With a decay a channel: two halves, each of as many tokens as the smallest product has rows.
CHANNEL_CHUNK = 32
_CUDA = {
    "states": Config(64, 64, 4, 2),
    "read": Config(64, 128, 8, 2),
    "decay": Config(64, 64, 8, 1),
    "pairs": Config(32, 32, 4, 1),
    "channels": Config(32, 64, 4, 1),
}
_AMD = {
    "states": _amd(64, 64),
    "read": _amd(64, 64),
    "decay": _amd(32, 32),
    "pairs": _amd(32, 32),
    "channels": _amd(32, 32),
}
TABLE: dict[str, dict[str, Config]] = {
    "sm_80": _CUDA,
    "sm_90": _CUDA,
    "gfx90a": _AMD,
    "gfx942": _AMD,
    # any other GPU has 99 KiB of shared memory
    "default": {name: Config(64, 64, 8, 1) for name in _CUDA},
}
# fp32 products at full precision, and in the interpreter a tile costs the same whatever its size.
EXACT = Config(16, 16)
INTERPRETED = Config(32, 32)


def chunk(dtype: torch.dtype, channels: bool) -> int:
    """Tokens that are worked out together, of q, k and v in that dtype.

    Args:
        channels: Whether each channel has a decay of its own.
    """
    if channels:
        return CHANNEL_CHUNK
    if kernels.interpreted():
        return INTERPRETED_CHUNK
    return EXACT_CHUNK if dtype == torch.float32 else CHUNK


def config(kernel: str, dtype: torch.dtype, device: torch.device) -> Config:
    """How to cut a kernel of ``TABLE`` for q, k and v in that dtype."""
    if kernels.interpreted():
        return INTERPRETED
    return EXACT if dtype == torch.float32 else TABLE[configs.family(device)][kernel]


def precision(dtype: torch.dtype, device: torch.device) -> str | None:
    """How what was computed is multiplied: in bf16, None, or in fp32 so (``tl.dot``)."""
    if dtype == torch.bfloat16:
        return None
    is_nvidia = not configs.family(device).startswith("gfx")
    # fp32 matrix instructions of AMD are exact
    return "tf32" if dtype == torch.float16 and is_nvidia else "ieee"


def launch(found: Config, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch."""
    options = {name: value for name, value in asdict(found).items() if value}
    del options["block_x"], options["block_e"]
    num_xcds = configs.NUM_XCDS.get(configs.family(device), 1)
    return options | {"NUM_XCDS": num_xcds, "enable_fp_fusion": True}
