"""Runs PTX on the CPU: for tests of what the compilers make of our kernels.

Whatever is not known here is refused by name, and so is what a kernel may not do: touch memory
outside of the tensors that it was given, part where a warp must be together, wait for nobody.
"""

from __future__ import annotations

from . import access, control, floats, integers, moves, warps  # noqa: F401  (fill the table)
from .machine import Machine, Order
from .memory import Memory, Region
from .parse import Entry, Refused, entries

__all__ = ["Entry", "Machine", "Memory", "Order", "Refused", "Region", "entries"]
