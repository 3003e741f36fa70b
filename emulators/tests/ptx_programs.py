"""Small PTX programs for tests of the interpreter, and what they leave in memory."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import ptx

_HEAD = """.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(
  .param .u64 input,
  .param .u64 output
)
{
  .reg .pred %p<16>;
  .reg .b16 %h<16>;
  .reg .b32 %r<64>;
  .reg .f32 %f<64>;
  .reg .b64 %rd<32>;
  .reg .f64 %fd<16>;
  ld.param.u64 %rd30, [input];
  ld.param.u64 %rd31, [output];
  mov.u32 %r60, %tid.x;
"""
# %rd20 points to the thread's own `words` words of the input, %rd21 of the output.
_OWN = """
  mul.wide.u32 %rd20, %r60, {input_bytes};
  add.s64 %rd20, %rd30, %rd20;
  mul.wide.u32 %rd21, %r60, {output_bytes};
  add.s64 %rd21, %rd31, %rd21;
"""


def entry(body: str, input_bytes: int = 4, output_bytes: int = 4) -> ptx.Entry:
    own = _OWN.format(input_bytes=input_bytes, output_bytes=output_bytes)
    return ptx.entries(_HEAD + own + body + "\n  ret;\n}\n")["kernel"]


def run(
    body: str,
    given: np.ndarray[Any, Any],
    result: np.dtype[Any] | type | str,
    count: int = 1,
    threads: int = 32,
    shared_bytes: int = 0,
    blocks: int = 1,
    **settings: Any,
) -> np.ndarray[Any, Any]:
    """Run a program that has %rd20 and %rd21 point to each thread's own input and output.

    Args:
        given: (threads, numbers), as the program reads it.
        count: Numbers of type ``result`` that each thread writes.
    """
    given = np.ascontiguousarray(given)
    out = np.zeros((threads, count), result)
    own_input = given.nbytes // threads if given.size else 0
    memory = ptx.Memory()
    for name, x, writable in (("input", given, False), ("output", out, True)):
        base = x.ctypes.data
        memory.add(ptx.Region(name, base, x.reshape(-1).view(np.uint8), writable))
    kernel = entry(body, own_input, out.nbytes // threads)
    arguments = [struct.pack("<Q", x.ctypes.data) for x in (given, out)]
    machine = ptx.Machine(memory, **settings)
    machine.launch(kernel, arguments, (blocks, 1, 1), threads, shared_bytes)
    return out
