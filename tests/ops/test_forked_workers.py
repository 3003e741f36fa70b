"""The CPU kernels in forked workers, as a DataLoader's are, beside torch's own matrix products.

What a level asks of the machine, leave for AMX' tiles and their configuration, holds for a process
and its children, and is no other code's.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from background import environment

from usp.machine import cpu, library

PROGRAM = """
import os
import traceback
import torch
import usp

torch.manual_seed(0)
x = torch.randn(3, 1, 150, 2, 64).bfloat16()
square = torch.randn(256, 256).bfloat16()

def results():
    q, k, v = (part.clone().requires_grad_() for part in x)
    out = usp.long_context_attention(q, k, v, None, causal=True, backend="native")
    out.float().square().sum().backward()
    product = square @ square  # by AMX where torch takes it
    again = usp.long_context_attention(q, k, v, None, causal=True, backend="native")
    assert torch.equal(out, again) and torch.equal(product, square @ square)
    return [y.detach() for y in (out, q.grad, k.grad, v.grad, product)]

def forked():
    shared = [torch.zeros_like(y).share_memory_() for y in (*[x[0]] * 4, square)]
    child = os.fork()
    if not child:
        status = 1
        try:
            torch.set_num_threads(1)
            for to, found in zip(shared, results()):
                to.copy_(found)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    return shared

before = forked()  # the first use is the child's
torch.set_num_threads(2)
mine = results()
for got in (before, forked()):
    for a, b in zip(got, mine):
        assert torch.equal(a, b)
"""


@pytest.mark.skipif(library.load() is not None, reason=f"compiled ops: {library.load()}")
def test_a_level_works_before_and_after_a_fork(tmp_path: Path) -> None:
    level = {"avx512_bf16": "amx_emulated"}.get(cpu.level(), cpu.level())
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment(USP_CPU_CAPABILITY=level),
        capture_output=True,
        text=True,
        timeout=250,
        cwd=tmp_path,  # not beside the sources, which hold no extension
    )
    assert done.returncode == 0, done.stderr[-2000:]
