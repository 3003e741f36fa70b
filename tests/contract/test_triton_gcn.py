"""What Triton makes of our kernels for AMD, executed instruction by instruction on the CPU.

No GPU is needed; each target in a process, whose Triton knows no other.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from background import environment
from places import SUPPORT

pytest.importorskip("triton")

pytestmark = pytest.mark.device_code
SECONDS = 900
LINEAR = {
    *("states_kernel", "read_kernel", "decay_kernel"),
    *("pairs_kernel", "channel_gradients_kernel"),
}
KERNELS = {
    "hip:gfx90a": {"forward_kernel", "keys_kernel", "queries_kernel"},
    "hip:gfx942": {"forward_kernel", "keys_kernel", "queries_kernel", "bias_gradient_kernel"},
    "hip:gfx90a linear": LINEAR,
    "hip:gfx942 linear": LINEAR,
}


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("target", KERNELS)
def test_machine_code_equals_the_oracle(target: str) -> None:
    command = [sys.executable, str(SUPPORT / "triton_gcn.py"), *target.split()]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert set(done.stdout.split()) == KERNELS[target]
