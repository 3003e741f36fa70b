"""Loads, stores and asynchronous copies.

Source: PTX ISA, "ld", "st", "cp.async" and what belongs to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .integers import BITS, INTEGERS
from .parse import Instruction, Operand, Vector
from .registers import TYPES, Array
from .table import Step, instruction

if TYPE_CHECKING:
    from .frame import Frame
    from .program import Code

_SPACES = ("global", "shared", "shared::cta", "param")
_TYPES = (*BITS, *INTEGERS, "b8", "u8", "s8", "f32", "f64")
# What caches may do changes nothing here.
_HINTS = {"nc", "L1::no_allocate", "L1::evict_last", "L1::evict_first", "L2::128B", "ca", "cg"}


def _modifiers(i: Instruction) -> tuple[str | None, int, str]:
    """State space, how many neighbours, and their type."""
    *rest, kind = i.parts[1:]
    rest = [part for part in rest if part not in _HINTS]
    space = rest.pop(0) if rest and rest[0] in _SPACES else None
    count = {"v2": 2, "v4": 4}[rest.pop(0)] if rest and rest[0] in ("v2", "v4") else 1
    if rest or kind not in _TYPES:
        raise i.refuse("modifier not known")
    return space, count, kind


def _parts(i: Instruction, operand: Operand, count: int) -> tuple[Operand, ...]:
    parts = operand.parts if isinstance(operand, Vector) else (operand,)
    if len(parts) != count:
        raise i.refuse(f"{len(parts)} registers for {count} numbers")
    return parts


@instruction("ld")
def load(code: Code, i: Instruction) -> Step:
    """ld[.space][.v2|.v4].type."""
    space, count, kind = _modifiers(i)
    find = code.space(space, i)
    parts = _parts(i, i.operands[0], count)
    slots = [code.extend(part, kind, i) for part in parts]
    address, dtype = code.address(i.operands[1], i), TYPES[kind]

    def step(f: Frame) -> None:
        addresses = address(f)
        values = find(f, addresses).read(addresses, dtype, count)
        for slot, value in zip(slots, values, strict=True):
            f.put_only(slot, value)

    return step


@instruction("st")
def store(code: Code, i: Instruction) -> Step:
    """st[.space][.v2|.v4].type; of a wider register, its low bits."""
    space, count, kind = _modifiers(i)
    if space == "param":
        raise i.refuse("a store to parameters")
    find = code.space(space, i)
    slots = [code.read_low(part, kind, i) for part in _parts(i, i.operands[1], count)]
    address = code.address(i.operands[0], i)

    def step(f: Frame) -> None:
        addresses = address(f)
        find(f, addresses).write(addresses, [f.only(f.v[slot]) for slot in slots])

    return step


# -- asynchronous copies


@dataclass
class _Copy:
    """Of some threads of a frame, by their number in it."""

    threads: Array
    to: Array
    source: Array
    sizes: Array
    width: int
    groups: Array  # number of the group that each thread's copy is in


class _Copies:
    """A frame's copies that have not landed. Group n is complete once n is committed."""

    def __init__(self, f: Frame) -> None:
        self.flying: list[_Copy] = []
        self.group = np.zeros(f.threads, np.int64)  # that each thread fills now

    def land(self, f: Frame, before: Array) -> None:
        """Those of threads that run now, of groups below ``before`` of each thread."""
        running, left = f.where(), []
        for copy in self.flying:
            here = running[copy.threads] & (copy.groups < before[copy.threads])
            if here.any():
                self._land(f, copy, here)
            if not here.all():
                kept = ~here
                left.append(
                    _Copy(
                        *(x[kept] for x in (copy.threads, copy.to, copy.source, copy.sizes)),
                        copy.width,
                        copy.groups[kept],
                    )
                )
        self.flying = left

    @staticmethod
    def _land(f: Frame, copy: _Copy, here: Array) -> None:
        to, source, sizes = copy.to[here], copy.source[here], copy.sizes[here]
        kind = np.dtype("<u8") if copy.width == 16 else np.dtype(f"<u{copy.width}")
        count = copy.width // kind.itemsize
        values = [np.zeros(len(to), kind) for _ in range(count)]
        full = sizes > 0
        for value, found in zip(
            values, f.block.memory.read(source[full], kind, count), strict=True
        ):
            value[full] = found
        f.block.shared.write(to, values)


def _copies(f: Frame) -> _Copies:
    key = f"cp.async of {f.first}"
    if key not in f.block.state:
        f.block.state[key] = _Copies(f)
    found = f.block.state[key]
    assert isinstance(found, _Copies)
    return found


@instruction("cp.async.ca", "cp.async.cg")
def copy_async(code: Code, i: Instruction) -> Step:
    """cp.async: to shared memory, some bytes of it read and the rest zeros; lands at its wait.

    All of the bytes or none are read here, which is what kernels ask for.
    """
    level, hints = i.parts[2], set(i.parts[5:])
    if i.parts[3] not in ("shared", "shared::cta") or i.parts[4] != "global":
        raise i.refuse("state space not known")
    if not hints <= {"L2::64B", "L2::128B", "L2::256B"} or not 3 <= len(i.operands) <= 4:
        raise i.refuse("modifier or operand not known")
    width = code.number(i.operands[2], i)
    if width not in ((16,) if level == "cg" else (4, 8, 16)):
        raise i.refuse("bytes of a copy")
    to, source = code.address(i.operands[0], i), code.address(i.operands[1], i)
    size = code.read(i.operands[3], "u32", i) if len(i.operands) == 4 else None

    def step(f: Frame) -> None:
        copies, threads = _copies(f), np.flatnonzero(f.where())
        sizes = np.full(f.active, width) if size is None else f.only(f.v[size]).astype(np.int64)
        if ((sizes != 0) & (sizes != width)).any():
            raise i.refuse(f"copies of {np.unique(sizes).tolist()} bytes of {width}")
        copy = _Copy(threads, to(f), source(f), sizes, width, copies.group[threads])
        f.block.shared.reserve(copy.to, width)
        f.block.memory.check(copy.source[sizes > 0], width)
        copies.flying.append(copy)

    return step


@instruction("cp.async.commit_group")
def commit(code: Code, i: Instruction) -> Step:
    """The copies so far that are in no group become one."""

    def step(f: Frame) -> None:
        _copies(f).group[f.mask] += 1

    return step


@instruction("cp.async.wait_all", "cp.async.wait_group")
def wait(code: Code, i: Instruction) -> Step:
    """Wait for all copies, or for all groups but the last N. Others land as late as they may."""
    if len(i.parts) != 3 or len(i.operands) != (i.parts[2] == "wait_group"):
        raise i.refuse("modifier or operand not known")
    last = code.number(i.operands[0], i) if i.operands else -1

    def step(f: Frame) -> None:
        copies = _copies(f)
        copies.land(f, copies.group - last)

    return step
