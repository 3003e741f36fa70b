"""A program: flash-attn 4's kernels are compiled through the adapter for a GPU that is not there.

``python tests/support/flash4_compiled.py FOLDER`` finds it in a folder, and prints what came out of
each call, a line of JSON each.
Tensors are fake ones on "cuda": kernels are made for them, and never run.
"""

from __future__ import annotations

import inspect
import json
import os
import site
import sys
import warnings
from typing import Any

# before it is imported
os.environ.update(FLASH_ATTENTION_ARCH="sm_90", CUTE_DSL_ARCH="sm_90a", FLASH_ATTENTION_NUM_SMS="8")

import stand_ins
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from usp.backends.library import flash4
from usp.backends.library.call import How, Packed

CALLS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"right": 0},
    "band": {"left": 100, "right": 0},
    "left": {"left": 100},
    "packed": {"right": 0},
    "softcap": {"right": 0, "softcap": 20.0},
}


def shapes(name: str, kernel: flash4.Flash4) -> list[list[int]]:
    """Of out, lse, dq, dk, dv for 600 queries and keys, eight heads of 64 and two of keys."""
    with FakeTensorMode():

        def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(shape, device="cuda", dtype=dtype)

        packed, lead = None, (2, 300)
        if name == "packed":
            cu = new(4, dtype=torch.int32)
            packed, lead = Packed(cu, cu, 300, 300), (600,)
        q, k, v = new(*lead, 8, 64), new(*lead, 2, 64), new(*lead, 2, 64)
        how = How(0.1, packed=packed, **CALLS[name])
        out, lse = kernel.forward(q, k, v, how)
        dlse = torch.empty_like(lse)
        grads = kernel.backward(torch.empty_like(out), q, k, v, out, lse, how, dlse)
        return [list(x.shape) for x in (out, lse, *grads)]


def lacking() -> list[str]:
    """Arguments of the stand-in that the library does not have."""
    from flash_attn.cute import interface

    return [
        f"{name}: {argument}"
        for name in ("_flash_attn_fwd", "_flash_attn_bwd")
        for argument in inspect.signature(getattr(stand_ins.Flash4, name)).parameters
        if argument not in inspect.signature(getattr(interface, name)).parameters
    ]


def main() -> None:
    warnings.simplefilter("ignore")
    sys.path.insert(0, sys.argv[1])
    site.addsitedir(sys.argv[1])  # with what its .pth file names
    assert flash4.missing() is None
    kernel = flash4.load()
    print(json.dumps(["lacking", lacking()]))
    for name in CALLS:
        print(json.dumps([name, shapes(name, kernel)]), flush=True)


if __name__ == "__main__":
    main()
