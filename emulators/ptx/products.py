"""wgmma: products of a warpgroup that run on while its warps do other things.

Source: PTX ISA 9.0, section 9.7.15, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate
Operation"; what lies where is in ``wgmma``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from .asynchronous import asynchronous
from .control import _same
from .parse import Immediate, Instruction, Operand, Refused, Vector
from .table import Step, instruction
from .wgmma import DEPTH, ROWS, Array, Descriptor, left_fragment, sum_fragment, widened

if TYPE_CHECKING:
    from .frame import Frame
    from .program import Code

_NUMBER = np.dtype("<u2")
_LEFT = left_fragment()
Slots = tuple[int, ...]
Action = Callable[[], None]
# Registers that the products of a kernel use.
_USED: WeakKeyDictionary[Code, set[int]] = WeakKeyDictionary()


@dataclass
class Products:
    """Of the warps of one frame.

    Attributes:
        sums: Accumulators that are in use, rows of the warps by columns, by their registers.
        groups: Those that were closed, oldest first; each product with its accumulator.
        ready: What the registers of products held at the last fence; None where there was none
            since the last wait.
        started: Where, and by which descriptors: alike in all warps of a warpgroup.
    """

    sums: dict[Slots, Array] = field(default_factory=dict)
    open: list[tuple[Slots, Action]] = field(default_factory=list)
    groups: list[list[tuple[Slots, Action]]] = field(default_factory=list)
    ready: dict[int, Array] | None = None
    started: list[tuple[int, ...]] = field(default_factory=list)

    def running(self) -> bool:
        return bool(self.open or self.groups)

    def used(self, slots: Slots) -> bool:
        return any(slots == s for group in [*self.groups, self.open] for s, _ in group)


def check_end(products: dict[int, object]) -> None:
    """Once a block has ended."""
    groups: dict[int, list[Products]] = {}
    for first, own in products.items():
        assert isinstance(own, Products)
        if own.running():
            raise Refused(f"products of thread {first} run on at the end of its block")
        groups.setdefault(first // 128, []).append(own)
    for group in groups.values():
        if any(own.started != group[0].started for own in group):
            raise Refused("the warps of a warpgroup did not start the same products")


def _products(f: Frame) -> Products:
    found = asynchronous(f.block).products.setdefault(f.first, Products())
    assert isinstance(found, Products)
    return found


def _whole(step: Step) -> Step:
    """All warps of the frame come together."""

    def whole(f: Frame) -> int | None:
        if f.threads > 128 or f.first % 128 + f.threads > 128:
            raise Refused(f"a frame of {f.threads} threads is not of one warpgroup")
        return step(f) if f.mask is True else f.meet()

    return whole


@instruction("wgmma.fence", "wgmma.commit_group", "wgmma.wait_group")
def order_products(code: Code, i: Instruction) -> Step:
    """fence: registers are ready. commit_group: a group ends. wait_group n: all but n are done."""
    if i.parts[2:] != ("sync", "aligned"):
        raise i.refuse("modifier not known")
    if i.parts[1] == "wait_group":
        (left,) = i.operands
        assert isinstance(left, Immediate)
        running = int(left.text)
        return _whole(lambda f: _wait(f, running))
    if i.parts[1] == "commit_group":
        return _whole(_commit)
    used = _USED.setdefault(code, set())

    def fence(f: Frame) -> None:
        _products(f).ready = {slot: f.v[slot].copy() for slot in used}

    return _whole(fence)


def _check_ready(f: Frame, slots: Slots) -> None:
    """PTX ISA, "wgmma.fence": whatever wrote registers comes before a fence, the fence before
    products that read them.
    """
    ready = _products(f).ready
    if ready is None:
        raise Refused("a product without a wgmma.fence since the last wait")
    for slot in slots:
        if not np.array_equal(f.v[slot].view(np.uint32), ready[slot].view(np.uint32)):
            raise Refused("a register was written since the last wgmma.fence")


def _commit(f: Frame) -> None:
    own = _products(f)
    own.groups.append(own.open)
    own.open = []


def _wait(f: Frame, running: int) -> None:
    own = _products(f)
    own.ready = None
    while len(own.groups) > running:
        group = own.groups.pop(0)
        for _, run in group:
            run()
        for slots in {slots for slots, _ in group}:
            if not own.used(slots):
                _put_sums(f, slots, own.sums.pop(slots))


@instruction("wgmma.mma_async")
def multiply(code: Code, i: Instruction) -> Step:
    """D = A B, or D += A B where scale-d is true; A from registers or shared memory. Summed in fp64
    here and rounded to fp32 once."""
    form = re.fullmatch(
        r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2", i.opcode
    )
    if form is None:
        raise i.refuse("modifier not known")
    columns, kind = int(form[1]), form[2]
    d, a, b, scale, *rest = i.operands
    sums = _slots(code, d, "f32", i, columns // 2, writes=True)
    # imm-scale-a and -b, then imm-trans-a where A is in shared memory, imm-trans-b
    scales, transposed = _immediates(rest[:2], i), [bool(n) for n in _immediates(rest[2:], i)]
    in_registers = isinstance(a, Vector)
    if scales != [1, 1] or len(transposed) != 2 - in_registers:
        raise i.refuse("factors or orders not known")
    right = _Matrix(code.read(b, "u64", i), kind, columns, transposed[-1])
    left: _Registers | _Matrix
    if in_registers:
        left = _Registers(_slots(code, a, "b32", i, 4), kind)
    else:
        left = _Matrix(code.read(a, "u64", i), kind, ROWS, transposed[0])
    adds, read = _predicate(code, scale, i), left.slots if isinstance(left, _Registers) else ()
    _USED.setdefault(code, set()).update(read, sums)

    def step(f: Frame) -> None:
        own = _products(f)
        a_of, b_of, added = left.of(f), right.of(f), adds(f)
        _check_ready(f, (*read, *sums) if added and sums not in own.sums else read)
        own.started.append((f.pc, left.bits(f), right.bits(f), added))
        _start(f, sums, added, lambda: a_of()[_own_rows(f, left)], lambda: b_of().T)

    return _whole(step)


def _start(
    f: Frame, slots: Slots, adds: bool, left: Callable[[], Array], right: Callable[[], Array]
) -> None:
    own, late = _products(f), asynchronous(f.block).late_products
    if slots not in own.sums:
        taken = {slot for others in own.sums for slot in others}
        if taken & set(slots):
            raise Refused("registers of another product that is still running")
        own.sums[slots] = _get_sums(f, slots)
        _poison(f, slots)

    def run() -> None:
        before = own.sums[slots] if adds else np.float32(0)
        # fp32 sums would depend on how many rows are here: a BLAS adds up by shape and CPU
        own.sums[slots] = (left().astype(np.float64) @ right() + before).astype(np.float32)

    if late:
        own.open.append((slots, run))
        return
    run()
    own.open.append((slots, lambda: None))


# -- operands


def _slots(
    code: Code, operand: Operand, kind: str, i: Instruction, count: int, writes: bool = False
) -> Slots:
    if not isinstance(operand, Vector) or len(operand.parts) != count:
        raise i.refuse(f"{count} registers are wanted")
    find = code.write if writes else code.read
    return tuple(find(part, kind, i) for part in operand.parts)


def _immediates(operands: list[Operand], i: Instruction) -> list[int]:
    if not all(isinstance(operand, Immediate) for operand in operands):
        raise i.refuse("a number is wanted")
    return [int(operand.text) for operand in operands if isinstance(operand, Immediate)]


def _predicate(code: Code, operand: Operand, i: Instruction) -> Callable[[Frame], bool]:
    if isinstance(operand, Immediate):
        constant = bool(int(operand.text))
        return lambda f: constant
    slot = code.read(operand, "pred", i)
    return lambda f: bool(_same(f, slot))


@lru_cache(maxsize=4096)
def _addresses(bits: int, extent: int, mn_major: bool) -> Array:
    return Descriptor.decode(bits).addresses(extent, mn_major)


@dataclass(frozen=True)
class _Matrix:
    """In shared memory, by the descriptor in a slot: (extent, 16)."""

    slot: int
    kind: str
    extent: int
    mn_major: bool

    def bits(self, f: Frame) -> int:
        return _same(f, self.slot)

    def of(self, f: Frame) -> Callable[[], Array]:
        addresses = _addresses(self.bits(f), self.extent, self.mn_major)
        shared = asynchronous(f.block).shared

        def read() -> Array:
            bits = shared.read_asynchronously(addresses.ravel(), _NUMBER)
            return widened(bits, self.kind).reshape(addresses.shape)

        return read


@dataclass(frozen=True)
class _Registers:
    """A in registers: (rows of the frame's warps, 16)."""

    slots: Slots
    kind: str

    def bits(self, f: Frame) -> int:
        return -1

    def of(self, f: Frame) -> Callable[[], Array]:
        def read() -> Array:
            pairs = np.stack([f.v[slot] for slot in self.slots], axis=1)  # low half first
            found = np.empty((f.threads // 2, DEPTH), np.float32)
            found[_of_frame(f, _LEFT)] = widened(pairs.view(_NUMBER), self.kind)
            return found

        return read


def _own_rows(f: Frame, left: _Registers | _Matrix) -> slice:
    """What the frame's warps multiply of A."""
    first = f.first % 128 // 2 if isinstance(left, _Matrix) else 0
    return slice(first, first + f.threads // 2)


# -- accumulators


def _of_frame(f: Frame, fragment: tuple[Array, Array]) -> tuple[Array, Array]:
    """Rows are those of the frame's warps."""
    row, column = fragment
    return row[: f.threads], column[: f.threads]


@lru_cache(maxsize=8)
def _sums_of(columns: int) -> tuple[Array, Array]:
    return sum_fragment(columns)


def _get_sums(f: Frame, slots: Slots) -> Array:
    columns = 2 * len(slots)
    found = np.empty((f.threads // 2, columns), np.float32)
    found[_of_frame(f, _sums_of(columns))] = np.stack([f.v[slot] for slot in slots], axis=1)
    return found


def _poison(f: Frame, slots: Slots) -> None:
    for slot in slots:
        f.v[slot].fill(np.nan)


def _put_sums(f: Frame, slots: Slots, sums: Array) -> None:
    row, column = _of_frame(f, _sums_of(2 * len(slots)))
    values = sums[row.T, column.T]
    for slot, value in zip(slots, values, strict=True):
        if not np.isnan(f.v[slot]).all():
            raise Refused("an accumulator was written while a product used it")
        f.v[slot][:] = value
