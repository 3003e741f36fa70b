"""Counts of a main loop's instructions, and the cycles that each resource of a chip needs for them.

A model and no measurement: each resource is taken alone, as if all others were in its shadow and
memory always in time. What takes the most cycles bounds the loop from below.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

Code = Iterable[tuple[str, str]]  # opcode with modifiers, operands

# Cycles of a multiprocessor's quarter for one instruction of a warp. Sources: CUDA C++ programming
# guide, throughput of arithmetic instructions (fp32 128 a clock on 9.0, 64 on 8.0; integers 64;
# exp2 16); shared memory 128 bytes a clock. mma.sync m16n8k16: A100's 312 TFLOP/s / (108 x 1.41
# GHz); wgmma m64nNk16: H100's 989 / (132 x 1.83 GHz); mma.sync there at 62.9 % of it, Luo et al.,
# arXiv:2402.13499. fp32 to bf16, twice as slow as an addition, is an assumption.
_FP32 = {"cuda:80": 2.0, "cuda:90": 1.0}
_HMMA = {"cuda:80": 8.0, "cuda:90": 6.4}
_FLOATS = {"FFMA", "FMUL", "FADD"}
_INTEGERS = {
    "FMNMX", "F2FP", "IADD3", "IADD", "LOP3", "ISETP", "SEL", "FSEL", "FSETP", "LEA", "PRMT", "SHF",
    "VIADD", "VIADDMNMX", "VIMNMX", "IABS", "SGXT", "PLOP3", "BMSK",
}  # fmt: skip
# Cycles of an AMD SIMD for one instruction of a wave: the CDNA 3 ISA guide's four passes of 16
# lanes, exp2 at a quarter of that rate; MFMA from MI300X' 1307 TFLOP/s / (304 CU x 2.1 GHz) and
# MI250X' 383 / (220 x 1.7).
_MFMA = {"32x32x8": 32.0, "16x16x16": 16.0}
_SLOWER = {"hip:gfx90a": 2.0}
_WAVE = 4.0


def counts(code: Code) -> dict[str, int]:
    """Instructions of a round by kind, the whole first."""
    found = Counter(_kind(opcode) for opcode, _ in code)
    kinds = sorted(found)
    return {"all": sum(found.values())} | {kind: found[kind] for kind in kinds}


def _kind(opcode: str) -> str:
    base = opcode.partition(".")[0]
    if base in _FLOATS:
        return "fp32"
    if base in _INTEGERS:
        return "integer"
    names = {"HGMMA": "matrix", "HMMA": "matrix", "MUFU": "exp", "IMAD": "imad", "LDSM": "shared"}
    names |= {"LDS": "shared", "STS": "shared", "LDGSTS": "copies", "LDL": "local", "STL": "local"}
    if base in names:
        return names[base]
    for start, kind in (
        ("v_mfma", "matrix"), ("v_exp", "exp"), ("v_accvgpr", "moves"), ("v_", "vector"),
        ("ds_", "shared"), ("global_", "copies"), ("buffer_", "copies"), ("scratch_", "local"),
    ):  # fmt: skip
        if base.startswith(start):
            return kind
    return "other"


def cycles(target: str, code: Code) -> dict[str, float]:
    """Of each resource for a round of one warp, or wave."""
    if target.startswith("hip:"):
        return _amd(target, code)
    found = dict.fromkeys(("matrix", "exp", "fp32", "integer", "shared", "issue"), 0.0)
    for opcode, operands in code:
        kind = _kind(opcode)
        found["issue"] += 1
        if kind == "matrix":
            matrix, shared = _product(target, opcode, operands)
            found["matrix"] += matrix
            found["shared"] += shared
        elif kind == "exp":
            found["exp"] += 8
        elif kind in ("fp32", "imad"):
            found["fp32"] += _FP32[target] if kind == "fp32" else 2
        elif kind == "integer":
            found["integer"] += 2
        elif kind in ("shared", "copies"):
            found["shared"] += 4 * _clocks(opcode)
    return found


def _product(target: str, opcode: str, operands: str) -> tuple[float, float]:
    """Of the tensor core, and of shared memory for the operands that lie there."""
    shape = re.search(r"\.64x(\d+)x16", opcode)
    if shape is None:
        return _HMMA[target], 0.0
    columns = int(shape[1])
    left = 0 if re.match(r"R\d+, R\d+", operands) else 64 * 16 * 2
    return columns / 2, (left + columns * 16 * 2) / 128


def _clocks(opcode: str) -> float:
    """Clocks of shared memory for what a warp reads or writes at once."""
    widths = {"128": 4.0, "64": 2.0, "4": 4.0, "2": 2.0}  # bits a lane; matrices of LDSM
    return next((widths[part] for part in opcode.split(".")[::-1] if part in widths), 1.0)


def _amd(target: str, code: Code) -> dict[str, float]:
    found = dict.fromkeys(("matrix", "exp", "issue"), 0.0)
    for opcode, _ in code:
        kind = _kind(opcode)
        found["issue"] += 4 * _WAVE if kind == "exp" else _WAVE
        if kind == "exp":
            found["exp"] += 4 * _WAVE
        if kind == "matrix":
            shape = re.search(r"_(\d+x\d+x\d+)", opcode)
            taken = _MFMA[shape[1]] if shape else 0.0
            found["matrix"] += taken * _SLOWER.get(target, 1.0)
    return found


def bound(found: dict[str, float]) -> tuple[str, float]:
    """The resource that takes most, and the matrix unit's share of its cycles."""
    name = max(found, key=lambda x: found[x])
    return name, found["matrix"] / found[name]
