"""How the Hopper kernels are cut: kernel x head dim.

The first of a row is what ``configs.pipelined`` and ``prefer_pipelines`` take, and does not spill,
as ``tests/kernels/test_hopper_compile.py`` checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Pipeline:
    """How a Hopper kernel (``kernels/hopper``) is cut.

    Attributes:
        block_q, block_k: As in ``Config``. What a program owns has 128 rows, 64 for each of its
            two consumers.
        num_stages: Tiles in shared memory of what it walks over.
    """

    block_q: int
    block_k: int
    num_stages: int

    def launch(self) -> dict[str, Any]:
        """Keyword arguments of a launch: three warpgroups share 512 registers a thread."""
        blocks = {"BLOCK_Q": self.block_q, "BLOCK_K": self.block_k, "STAGES": self.num_stages}
        return blocks | {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": True}


# What tuning tries on sm_90 besides the row of ``configs.TABLE``. The first of a row comes before
# the portable kernels once it was found right there; which is faster no GPU has shown. Backward at
# head dim 256 would spill.
HOPPER: dict[str, dict[int, tuple[Pipeline, ...]]] = {
    "forward": {
        64: (Pipeline(128, 128, 4), Pipeline(128, 128, 2)),
        128: (Pipeline(128, 128, 2), Pipeline(128, 64, 4)),
        # 64 keys keep 40 bytes in local memory
        256: (Pipeline(128, 32, 4),),
    },
    "backward_keys": {
        64: (Pipeline(64, 128, 4), Pipeline(64, 128, 2)),
        128: (Pipeline(64, 128, 4), Pipeline(64, 128, 2)),
    },
    "backward_queries": {
        64: (Pipeline(128, 128, 4), Pipeline(128, 64, 4)),
        128: (Pipeline(128, 64, 4), Pipeline(128, 64, 3)),
    },
}
