"""What the threads of a warp do together: shuffles, votes and matrices.

Source: PTX ISA, "shfl.sync", "vote.sync", "activemask", "elect.sync", "redux.sync", and "Warp Level
Matrix Instructions". Thread 4 r + c of a warp is in group r and has place c in it, in the words of
"Matrix Fragments for mma.m16n8k16".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .moves import from_bfloat16
from .parse import Instruction, Operand, Pair, Refused, Sink, Vector
from .registers import Array
from .table import Step, instruction

if TYPE_CHECKING:
    from .frame import Frame
    from .program import Code

WARP = 32
_LANE = np.arange(WARP)


def _all_lanes(f: Frame, slot: int) -> None:
    if (f.only(f.v[slot]) != 0xFFFFFFFF).any():
        raise Refused("a mask of some lanes")


@instruction("shfl.sync", whole_warps=True)
def shuffle(code: Code, i: Instruction) -> Step:
    """shfl.sync: another lane's value; p says whether that lane is in range, else it is its own."""
    if len(i.parts) != 4 or i.parts[3] != "b32" or i.parts[2] not in ("up", "down", "bfly", "idx"):
        raise i.refuse("modifier not known")
    mode, wanted = i.parts[2], i.operands[0]
    value, found = (wanted.first, wanted.second) if isinstance(wanted, Pair) else (wanted, Sink())
    d = code.write(value, "b32", i)
    p = None if isinstance(found, Sink) else code.write(found, "pred", i)
    a, b, c, members = (code.read(operand, "u32", i) for operand in i.operands[1:])

    def step(f: Frame) -> None:
        _all_lanes(f, members)
        source, inside = _source_lane(mode, f.lanes, f.v[b] & 31, f.v[c])
        warp = np.arange(f.threads) // WARP * WARP
        result = f.v[a][warp + np.where(inside, source, f.lanes)]
        f.put(d, result)
        if p is not None:
            f.put(p, inside)

    return step


def _source_lane(mode: str, lane: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """The pseudocode of shfl.sync. ``c`` has the clamp in bits 0-4, the segment mask in 8-12."""
    b, clamp, segment = b.astype(np.int64), (c & 31).astype(np.int64), (c >> 8 & 31)
    segment = segment.astype(np.int64)
    last = (lane & segment) | (clamp & ~segment)
    first = lane & segment
    if mode == "up":
        return lane - b, lane - b >= last
    if mode == "down":
        return lane + b, lane + b <= last
    if mode == "bfly":
        return lane ^ b, (lane ^ b) <= last
    at = first | (b & ~segment)
    return at, at <= last


@instruction("vote.sync", whole_warps=True)
def vote(code: Code, i: Instruction) -> Step:
    """vote.sync.any, .all, .uni of a predicate, and .ballot of it."""
    if i.parts[2:] not in (("any", "pred"), ("all", "pred"), ("ballot", "b32")):
        raise i.refuse("modifier not known")
    d = code.write(i.operands[0], i.parts[3], i)
    a, members = code.read(i.operands[1], "pred", i), code.read(i.operands[2], "u32", i)

    def step(f: Frame) -> None:
        _all_lanes(f, members)
        votes = f.v[a].reshape(-1, WARP)
        if i.parts[2] == "ballot":
            result = (votes.astype(np.uint64) << _LANE.astype(np.uint64)).sum(1)
        else:
            result = votes.any(1) if i.parts[2] == "any" else votes.all(1)
        f.put(d, np.repeat(result, WARP))

    return step


_REDUCE = {"min": np.min, "max": np.max, "add": np.sum}


@instruction("redux.sync", whole_warps=True)
def reduce(code: Code, i: Instruction) -> Step:
    """redux.sync.min, .max, .add of 32-bit integers of all lanes."""
    if len(i.parts) != 4 or i.parts[2] not in _REDUCE or i.parts[3] not in ("s32", "u32"):
        raise i.refuse("modifier not known")
    function = _REDUCE[i.parts[2]]
    d, a = code.write(i.operands[0], i.parts[3], i), code.read(i.operands[1], i.parts[3], i)
    members = code.read(i.operands[2], "u32", i)

    def step(f: Frame) -> None:
        _all_lanes(f, members)
        found = function(f.v[a].reshape(-1, WARP), axis=1)
        f.put(d, np.repeat(found.astype(f.v[a].dtype), WARP))

    return step


# -- matrices


def _matrices(i: Instruction, operand: Operand, count: int) -> tuple[Operand, ...]:
    if not isinstance(operand, Vector) or len(operand.parts) != count:
        raise i.refuse(f"{count} registers are needed")
    return operand.parts


@instruction("ldmatrix.sync.aligned.m8n8", whole_warps=True)
def load_matrices(code: Code, i: Instruction) -> Step:
    """ldmatrix: 8x8 matrices of 16 bits, whose rows lie where lanes 8m to 8m + 7 say.

    Lane 4 r + c gets elements (r, 2c) and (r, 2c + 1) of each; with .trans (2c, r), (2c + 1, r).
    """
    *rest, kind = i.parts[4:]
    counts = {"x1": 1, "x2": 2, "x4": 4}
    count, transposed = counts.get(rest[0], 0), rest[1:2] == ["trans"]
    space = rest[1 + transposed :]
    if not count or space not in (["shared"], ["shared::cta"]) or kind != "b16":
        raise i.refuse("modifier not known")
    slots = [code.write(part, "b32", i) for part in _matrices(i, i.operands[0], count)]
    address = code.address(i.operands[1], i)

    def step(f: Frame) -> None:
        rows = address(f).reshape(-1, WARP)[:, : 8 * count].reshape(-1)
        words = f.block.shared.read(rows, np.dtype("<u4"), 4)
        matrices = np.stack(words, 1).reshape(-1, count, 8, 4)
        if transposed:
            halves = matrices.view(np.uint16)
            matrices = np.ascontiguousarray(halves.swapaxes(2, 3)).view(np.uint32)
        lanes = matrices.reshape(-1, count, WARP)
        for n, slot in enumerate(slots):
            f.put_only(slot, lanes[:, n].reshape(-1))

    return step


def _fragment(rows: Array, columns: Array, shape: tuple[int, int]) -> Array:
    """For each element of a matrix, its place in a warp's fragments laid out lane by lane."""
    places = np.empty(shape, np.int64)
    places[rows, columns] = np.arange(rows.size).reshape(rows.shape)
    return places


def _m16n8k16() -> tuple[Array, Array, Array]:
    """Where A, B and C lie: lane's elements a0..a7, b0..b3, c0..c3."""
    group, place = _LANE[:, None] // 4, _LANE[:, None] % 4
    n = np.arange(8)
    upper = (n < 2) | ((n >= 4) & (n < 6))
    a_rows = np.where(upper, group, group + 8)
    a_columns = place * 2 + (n & 1) + np.where(n < 4, 0, 8)
    n = np.arange(4)
    b_rows = place * 2 + (n & 1) + np.where(n < 2, 0, 8)
    c_rows, c_columns = np.where(n < 2, group, group + 8), place * 2 + (n & 1)
    return (
        _fragment(a_rows, a_columns, (16, 16)),
        _fragment(b_rows, np.broadcast_to(group, b_rows.shape), (16, 8)),
        _fragment(c_rows, c_columns, (16, 8)),
    )


_A, _B, _C = _m16n8k16()
_FROM_C = np.argsort(_C.reshape(-1))  # which element each place holds


def _numbers(f: Frame, slots: list[int], brain: bool) -> Array:
    """(warps, lanes x elements) in fp32, of registers with two 16-bit numbers."""
    packed = np.empty((f.active, len(slots)), np.uint32)
    for n, slot in enumerate(slots):
        packed[:, n] = f.only(f.v[slot])
    halves = packed.view(np.uint16)
    numbers = from_bfloat16(halves) if brain else halves.view(np.float16).astype(np.float32)
    return numbers.reshape(-1, WARP * 2 * len(slots))


@instruction("mma.sync.aligned.m16n8k16.row.col", whole_warps=True)
def multiply_matrices(code: Code, i: Instruction) -> Step:
    """mma.sync: d = a b + c, of bf16 or fp16, summed in fp64 here and rounded to fp32 once."""
    if i.parts[6:] not in (("f32", "f16", "f16", "f32"), ("f32", "bf16", "bf16", "f32")):
        raise i.refuse("modifier not known")
    brain = i.parts[7] == "bf16"
    counts = (4, 4, 2, 4)
    d, *sources = (_matrices(i, o, n) for o, n in zip(i.operands, counts, strict=True))
    to = [code.write(part, "f32", i) for part in d]
    a, b = ([code.read(part, "b32", i) for part in parts] for parts in sources[:2])
    c = [code.read(part, "f32", i) for part in sources[2]]

    def step(f: Frame) -> None:
        left = _numbers(f, a, brain).take(_A, 1).astype(np.float64)
        right = _numbers(f, b, brain).take(_B, 1).astype(np.float64)
        sums = (left @ right).reshape(-1, 128)[:, _FROM_C].reshape(-1, 4)
        results = [sums[:, n] + f.only(f.v[start]) for n, start in enumerate(c)]
        for slot, result in zip(to, results, strict=True):  # some of c, maybe
            f.put_only(slot, result.astype(np.float32))

    return step
