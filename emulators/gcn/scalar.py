"""Scalar arithmetic, branches and waits.

Source: "CDNA3 ISA" 4 "Program Flow Control", 5 "Scalar ALU Operations", 12.1-12.5 (SOP2, SOPK,
SOP1, SOPC, SOPP).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .assembly import Instruction, Unknown
from .operands import scalar_reader, scalar_writer
from .wave import VCC, Wave

Step = Callable[[Wave], object]
STOP, BARRIER = "stop", "barrier"  # what a step says to the workgroup

_M32, _M64 = (1 << 32) - 1, (1 << 64) - 1


def signed(x: int, bits: int = 32) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def _overflows(x: int) -> int:
    return int(not -(1 << 31) <= x < 1 << 31)


def _add_signed(a: int, b: int, _: int) -> tuple[int, int]:
    total = signed(a) + signed(b)
    return total, _overflows(total)


def _subtract_signed(a: int, b: int, _: int) -> tuple[int, int]:
    total = signed(a) - signed(b)
    return total, _overflows(total)


def _is_set(bits: int, function: Callable[[int, int], int]) -> Callable[..., tuple[int, int]]:
    """SCC says whether the result is not 0."""

    def result(a: int, b: int, _: int) -> tuple[int, int]:
        x = function(a, b) & ((1 << bits) - 1)
        return x, int(x != 0)

    return result


def _shift_add(shift: int) -> Callable[[int, int, int], tuple[int, int]]:
    def result(a: int, b: int, _: int) -> tuple[int, int]:
        total = (a << shift) + b
        return total, int(total > _M32)

    return result


def _extract_unsigned(a: int, b: int) -> int:
    return a >> (b & 31) & ((1 << (b >> 16 & 0x7F)) - 1)


def _extract(bits: int) -> Callable[[int, int], int]:
    def extract(a: int, b: int) -> int:
        offset, width = b & (bits - 1), b >> 16 & 0x7F
        return signed(signed(a, bits) >> offset, width) if width else 0

    return extract


def _choose_signed(first: Callable[[int, int], bool]) -> Callable[..., tuple[int, int]]:
    """SCC says whether it was the first."""

    def result(a: int, b: int, _: int) -> tuple[int, int]:
        chosen = first(signed(a), signed(b))
        return (a if chosen else b), int(chosen)

    return result


_LOGIC: dict[str, Callable[[int, int], int]] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "andn2": lambda a, b: a & ~b,
    "orn2": lambda a, b: a | ~b,
}

# (bits of the result, of a, of b): (a, b, scc) -> (result, scc)
_BINARY: dict[str, tuple[tuple[int, int, int], Callable[[int, int, int], tuple[int, int]]]] = {
    "s_add_u32": ((32, 32, 32), lambda a, b, c: (a + b, int(a + b > _M32))),
    "s_addc_u32": ((32, 32, 32), lambda a, b, c: (a + b + c, int(a + b + c > _M32))),
    "s_sub_u32": ((32, 32, 32), lambda a, b, c: (a - b, int(b > a))),
    "s_subb_u32": ((32, 32, 32), lambda a, b, c: (a - b - c, int(b + c > a))),
    **{f"s_lshl{n}_add_u32": ((32, 32, 32), _shift_add(n)) for n in range(1, 5)},
    "s_add_i32": ((32, 32, 32), _add_signed),
    "s_sub_i32": ((32, 32, 32), _subtract_signed),
    "s_mul_i32": ((32, 32, 32), lambda a, b, c: (a * b, c)),
    "s_mul_hi_u32": ((32, 32, 32), lambda a, b, c: (a * b >> 32, c)),
    "s_mul_hi_i32": ((32, 32, 32), lambda a, b, c: (signed(a) * signed(b) >> 32, c)),
    "s_min_i32": ((32, 32, 32), _choose_signed(lambda a, b: a < b)),
    "s_max_i32": ((32, 32, 32), _choose_signed(lambda a, b: a >= b)),
    "s_min_u32": ((32, 32, 32), lambda a, b, c: (a, 1) if a < b else (b, 0)),
    "s_lshl_b32": ((32, 32, 32), _is_set(32, lambda a, b: a << (b & 31))),
    "s_lshr_b32": ((32, 32, 32), _is_set(32, lambda a, b: a >> (b & 31))),
    "s_ashr_i32": ((32, 32, 32), _is_set(32, lambda a, b: signed(a) >> (b & 31))),
    "s_lshl_b64": ((64, 64, 32), _is_set(64, lambda a, b: a << (b & 63))),
    "s_lshr_b64": ((64, 64, 32), _is_set(64, lambda a, b: a >> (b & 63))),
    "s_ashr_i64": ((64, 64, 32), _is_set(64, lambda a, b: signed(a, 64) >> (b & 63))),
    "s_bfe_u32": ((32, 32, 32), _is_set(32, _extract_unsigned)),
    "s_bfe_i32": ((32, 32, 32), _is_set(32, _extract(32))),
    "s_bfe_i64": ((64, 64, 32), _is_set(64, _extract(64))),
    "s_cselect_b32": ((32, 32, 32), lambda a, b, c: (a if c else b, c)),
    "s_cselect_b64": ((64, 64, 64), lambda a, b, c: (a if c else b, c)),
}
for _name, _function in _LOGIC.items():
    for _bits in (32, 64):
        _BINARY[f"s_{_name}_b{_bits}"] = ((_bits,) * 3, _is_set(_bits, _function))


def _absolute(a: int, _: int) -> tuple[int, int]:
    return abs(signed(a)), int(a != 0)


# bits: (a, scc) -> (result, scc)
_UNARY: dict[str, tuple[int, Callable[[int, int], tuple[int, int]]]] = {
    "s_mov_b32": (32, lambda a, c: (a, c)),
    "s_mov_b64": (64, lambda a, c: (a, c)),
    "s_not_b32": (32, lambda a, c: (~a, int(~a & _M32 != 0))),
    "s_not_b64": (64, lambda a, c: (~a, int(~a & _M64 != 0))),
    "s_abs_i32": (32, _absolute),
}

_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "lg": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
}

_WITH_16_BITS: dict[str, Callable[[int, int, int], tuple[int, int]]] = {
    "s_movk_i32": lambda a, b, c: (b, c),
    "s_addk_i32": _add_signed,
    "s_mulk_i32": lambda a, b, c: (a * b, c),
}

_TAKEN: dict[str, Callable[[Wave], object]] = {
    "s_branch": lambda w: True,
    "s_cbranch_scc0": lambda w: not w.scc,
    "s_cbranch_scc1": lambda w: w.scc,
    "s_cbranch_vccz": lambda w: not w.pair(VCC),
    "s_cbranch_vccnz": lambda w: w.pair(VCC),
    "s_cbranch_execz": lambda w: not w.exec,
    "s_cbranch_execnz": lambda w: w.exec,
}


def build(instruction: Instruction, labels: dict[str, int]) -> Step | None:
    """What a scalar instruction does, None where it is no scalar one."""
    name, operands = instruction.name, instruction.operands
    if not name.startswith("s_") or name.startswith("s_load"):
        return None
    instruction.allow()
    if name in _BINARY:
        return _binary(*_BINARY[name], operands)
    if name in _UNARY:
        return _unary(*_UNARY[name], operands)
    if name in _TAKEN:
        return _branch(_TAKEN[name], labels[operands[0]])
    if name.endswith("_saveexec_b64"):
        return _save_exec(_LOGIC[name[2:].removesuffix("_saveexec_b64")], operands)
    if name.startswith(("s_cmp_", "s_cmpk_")):
        return _comparison(name, operands)
    return _other(instruction)


def _binary(bits: tuple[int, int, int], function: Any, operands: tuple[str, ...]) -> Step:
    put = scalar_writer(operands[0], bits[0])
    a, b = (scalar_reader(x, n) for x, n in zip(operands[1:], bits[1:], strict=True))

    def step(w: Wave) -> None:
        result, scc = function(a(w), b(w), w.scc)
        put(w, result)
        w.scc = scc

    return step


def _unary(bits: int, function: Any, operands: tuple[str, ...]) -> Step:
    put, a = scalar_writer(operands[0], bits), scalar_reader(operands[1], bits)

    def step(w: Wave) -> None:
        result, scc = function(a(w), w.scc)
        put(w, result)
        w.scc = scc

    return step


def _branch(taken: Callable[[Wave], object], target: int) -> Step:
    def step(w: Wave) -> None:
        if taken(w):
            w.pc = target

    return step


def _save_exec(function: Callable[[int, int], int], operands: tuple[str, ...]) -> Step:
    put, a = scalar_writer(operands[0], 64), scalar_reader(operands[1], 64)

    def step(w: Wave) -> None:
        source, before = a(w), w.exec
        put(w, before)
        w.exec = function(source, before) & _M64
        w.scc = int(w.exec != 0)

    return step


def _comparison(name: str, operands: tuple[str, ...]) -> Step:
    """With 16 bits in the instruction: they are extended as the numbers have signs or not."""
    _, form, relation, kind = name.split("_")
    if form == "cmpk" and kind == "i32":
        operands = (operands[0], str(signed(int(operands[1], 0), 16)))
    compare, bits = _COMPARE[relation], int(kind[1:])
    a, b = (scalar_reader(x, bits) for x in operands)

    def step(w: Wave) -> None:
        x, y = a(w), b(w)
        if kind[0] == "i":
            x, y = signed(x, bits), signed(y, bits)
        w.scc = int(compare(x, y))

    return step


def _other(instruction: Instruction) -> Step:
    name, operands = instruction.name, instruction.operands
    if name == "s_endpgm":
        return lambda w: STOP
    if name == "s_barrier":
        return lambda w: BARRIER
    if name == "s_nop":
        return lambda w: None
    if name == "s_waitcnt":
        return _wait(operands[0])
    if name in ("s_bitcmp0_b32", "s_bitcmp1_b32"):
        a, b = (scalar_reader(x, 32) for x in operands)
        wanted = int(name == "s_bitcmp1_b32")
        return lambda w: setattr(w, "scc", int((a(w) >> (b(w) & 31) & 1) == wanted))
    if name in _WITH_16_BITS:
        function, value = _WITH_16_BITS[name], signed(int(operands[1], 0), 16) & _M32
        put, before = scalar_writer(operands[0], 32), scalar_reader(operands[0], 32)

        def step(w: Wave) -> None:
            result, w.scc = function(before(w), value, w.scc)
            put(w, result)

        return step
    raise Unknown(instruction.text)


def _wait(text: str) -> Step:
    counts = {name: int(count) for name, count in re.findall(r"(\w+)\((\d+)\)", text)}
    if counts.get("expcnt") == 7:  # its highest number: waits for nothing
        del counts["expcnt"]
    if not counts or counts.keys() - {"vmcnt", "lgkmcnt"}:
        raise Unknown(f"s_waitcnt {text}")

    def step(w: Wave) -> None:
        if "vmcnt" in counts:
            w.await_vector(counts["vmcnt"])
        if "lgkmcnt" in counts:
            w.await_local(counts["lgkmcnt"])

    return step
