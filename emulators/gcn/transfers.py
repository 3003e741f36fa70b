"""Loads, stores and exchanges between lanes: they are under way until an s_waitcnt has seen them.

Source: "CDNA3 ISA" 8 "Scalar Memory Operations", 9.3 "Global", 11 "Local Data Share",
4.4 "S_WAITCNT".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .assembly import Instruction, Unknown
from .operands import Operand, parse, reader, scalar_reader
from .scalar import Step
from .wave import LANES, Wave

SIZES = {
    "byte": 1,
    "ubyte": 1,
    "short": 2,
    "ushort": 2,
    "dword": 4,
    "dwordx2": 8,
    "dwordx3": 12,
    "dwordx4": 16,
    "b8": 1,
    "u8": 1,
    "b16": 2,
    "u16": 2,
    "b32": 4,
    "b64": 8,
    "b128": 16,
}
_LOADS = ("global_load", "buffer_load", "scratch_load", "s_load", "ds_read", "ds_bpermute")
_GLOBAL = re.compile(
    r"global_(load|store)_(ubyte|byte|ushort|short_d16_hi|short|dword(?:x[234])?)$"
)
_LOCAL = re.compile(r"ds_(?:(read)|write)_(b8|u8|b16|u16|b32|b64|b128)$|ds_write_(b16)_d16_hi$")
_LOCAL_PAIR = re.compile(r"ds_(read|write)2(st64)?_(b32|b64)$")


def build(instruction: Instruction) -> Step | None:
    """What such an instruction does; None where this file does not know it."""
    name = instruction.name
    if (found := _GLOBAL.match(name)) is not None:
        return _global(instruction, found[1] == "load", found[2])
    if (found := _LOCAL.match(name)) is not None:
        return _local(instruction, found[1] == "read", SIZES[found[2] or found[3]], bool(found[3]))
    if (found := _LOCAL_PAIR.match(name)) is not None:
        step = 64 if found[2] else 1
        return _local_pair(instruction, found[1] == "read", SIZES[found[3]], step)
    if name == "ds_bpermute_b32":
        return _permute(instruction)
    if name.startswith("s_load_dword"):
        return _scalar_load(instruction)
    return None


def loads(instruction: Instruction) -> bool:
    """Whether its first operand is what it will write."""
    return instruction.name.startswith(_LOADS)


def vectors(text: str, size: int) -> Operand:
    operand = parse(text)
    if operand.kind != "v" or operand.width != max(1, size // 4):
        raise Unknown(f"{text} for {size} bytes")
    return operand


def put_bytes(w: Wave, n: int, lanes: Any, content: Any) -> None:
    """Bytes (lanes, size) into registers; less than 4 bytes are extended by zeros."""
    size = content.shape[1]
    if size < 4:
        w.u32[n][lanes] = content.view({1: np.uint8, 2: np.uint16}[size])[:, 0]
        return
    for i, row in enumerate(content.view(np.uint32).T):
        w.u32[n + i][lanes] = row


def get_bytes(w: Wave, n: int, lanes: Any, size: int, *, high: bool = False) -> Any:
    """Bytes (lanes, size) of registers."""
    if size < 4:
        half = w.u32[n][lanes] >> np.uint32(16 if high else 0)
        return half.astype({1: np.uint8, 2: np.uint16}[size])[:, None].view(np.uint8)
    rows = np.stack([row[lanes] for row in w.u32[n : n + size // 4]], -1)
    return np.ascontiguousarray(rows).view(np.uint8)


def _global(instruction: Instruction, loads: bool, kind: str) -> Step:
    """The address: 64 bits of a lane, or a scalar one and 32 bits of a lane."""
    instruction.allow("offset", "glc", "slc", "sc0", "sc1", "nt")
    high, size = kind.endswith("_d16_hi"), SIZES[kind.removesuffix("_d16_hi")]
    first, second, base = instruction.operands
    at, data = (second, first) if loads else (first, second)
    offset, n = instruction.number("offset"), vectors(data, size)
    if base == "off":
        read = reader(at, "i64")
        address: Callable[[Wave], Any] = lambda w: read(w) + offset  # noqa: E731
    else:
        start, step32 = scalar_reader(base, 64), reader(at, "u32")
        address = lambda w: step32(w).astype(np.int64) + (start(w) + offset)  # noqa: E731

    def step(w: Wave) -> None:
        lanes = np.flatnonzero(w.mask)
        places = address(w)[lanes]
        if loads:
            w.transfer(
                w.vector_transfers,
                n.registers,
                lambda: put_bytes(w, n.index, lanes, w.memory.read(places, size)),
            )
        else:
            content = get_bytes(w, n.index, lanes, size, high=high)
            w.transfer(w.vector_transfers, frozenset(), lambda: w.memory.write(places, content))

    return step


def _local(instruction: Instruction, reads: bool, size: int, high: bool) -> Step:
    instruction.allow("offset")
    first, second = instruction.operands
    address = reader(second if reads else first, "u32")
    offset, data = instruction.number("offset"), vectors(first if reads else second, size)
    n = data.index

    def step(w: Wave) -> None:
        lanes = np.flatnonzero(w.mask)
        places = address(w)[lanes].astype(np.int64) + offset
        if reads:
            w.transfer(
                w.local_transfers,
                data.registers,
                lambda: put_bytes(w, n, lanes, w.lds.read(places, size)),
            )
        else:
            content = get_bytes(w, n, lanes, size, high=high)
            w.transfer(w.local_transfers, frozenset(), lambda: w.lds.write(places, content))

    return step


def _local_pair(instruction: Instruction, reads: bool, size: int, stride: int) -> Step:
    """Two places, whose offsets count numbers, or 64 of them."""
    instruction.allow("offset0", "offset1")
    first, *rest = instruction.operands
    offsets = [instruction.number(f"offset{i}") * size * stride for i in range(2)]
    words = size // 4
    if reads:
        address, pair = reader(rest[0], "u32"), vectors(first, 2 * size)
        registers, data = pair.registers, [pair.index, pair.index + words]
    else:
        address, registers = reader(first, "u32"), frozenset()
        data = [vectors(x, size).index for x in rest]

    def step(w: Wave) -> None:
        lanes = np.flatnonzero(w.mask)
        base = address(w)[lanes].astype(np.int64)
        content = [] if reads else [get_bytes(w, n, lanes, size) for n in data]

        def land() -> None:
            if reads:
                found = [w.lds.read(base + offset, size) for offset in offsets]
                for n, part in zip(data, found, strict=True):
                    put_bytes(w, n, lanes, part)
            else:
                for offset, part in zip(offsets, content, strict=True):
                    w.lds.write(base + offset, part)

        w.transfer(w.local_transfers, registers, land)

    return step


def _permute(instruction: Instruction) -> Step:
    """Each lane takes what the lane of its address / 4 has; 0 of one that is not active."""
    instruction.allow("offset")
    result, at, data = instruction.operands
    n, offset = vectors(result, 4), np.uint32(instruction.number("offset"))
    address, read = reader(at, "u32"), reader(data, "u32")

    def step(w: Wave) -> None:
        source = ((address(w) + offset) >> np.uint32(2)) % np.uint32(LANES)
        values = np.where(w.mask, read(w), np.uint32(0))[source]
        mask = w.mask
        w.transfer(
            w.local_transfers,
            n.registers,
            lambda: np.copyto(w.u32[n.index], values, where=mask),
        )

    return step


def _scalar_load(instruction: Instruction) -> Step:
    instruction.allow()
    result, base, offset = instruction.operands
    n = parse(result)
    count = int(instruction.name.removeprefix("s_load_dword").removeprefix("x") or 1)
    if n.kind != "s" or n.width != count:
        raise Unknown(instruction.text)
    start, more = scalar_reader(base, 64), scalar_reader(offset, 32)

    def step(w: Wave) -> None:
        place = np.array([(start(w) + more(w)) & ~3])

        def land() -> None:
            words = w.memory.read(place, 4 * count).view(np.uint32)[0]
            w.s[n.index : n.index + count] = words.tolist()

        w.transfer(w.local_transfers, n.registers, land, scalar=True)

    return step
