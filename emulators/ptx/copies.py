"""Barriers in shared memory that count bytes, and the copies of tensors that they count.

Source: PTX ISA 9.0, sections 9.7.9.27, "cp.async.bulk.tensor", and 9.7.13.15, "mbarrier".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np

from .asynchronous import asynchronous
from .machine import Block
from .mbarrier import MARK, BarrierError
from .memory import PARAM_WINDOW
from .parse import Address, Instruction, Operand, Refused, Vector
from .table import Step, instruction
from .tensor_map import BYTES, TensorMap, unpacked

if TYPE_CHECKING:
    from .frame import Frame
    from .program import Code

_MARK = np.dtype("<u8")
_NUMBER = np.dtype("<u2")
_COPY = "cp.async.bulk.tensor"
_COMPLETES = "mbarrier::complete_tx::bytes"


# -- barriers


def _barrier_address(code: Code, i: Instruction, operand: Operand) -> Callable[[Frame], list[int]]:
    address = code.address(operand, i)

    def checked(f: Frame) -> list[int]:
        """Of each thread that runs, once it is sure that nothing was written over a barrier."""
        found = address(f)
        (marks,) = f.block.shared.read(found, _MARK)
        if (marks != MARK).any():
            raise Refused("what lies there is no barrier, or something was written over it")
        return [int(at) for at in found]

    return checked


def _form(i: Instruction, name: str, *spaces: str) -> None:
    if i.opcode not in {f"{name}.{space}.b64" for space in spaces}:
        raise i.refuse("modifier not known")


@instruction("mbarrier.init")
def init_barrier(code: Code, i: Instruction) -> Step:
    _form(i, "mbarrier.init", "shared::cta", "shared")
    place, count = i.operands
    address, arrivals = code.address(place, i), code.read(count, "u32", i)

    def step(f: Frame) -> None:
        for at, expected in zip(address(f), f.only(f.v[arrivals]), strict=True):
            asynchronous(f.block).barriers.init(int(at), int(expected))
            f.block.shared.write(np.array([at]), [np.array([MARK], _MARK)])

    return step


@instruction("mbarrier.arrive")
def arrive(code: Code, i: Instruction) -> Step:
    """With .expect_tx the phase waits for so many bytes more."""
    expects = "expect_tx" in i.parts
    _form(i, "mbarrier.arrive" + ".expect_tx" * expects, "shared::cta", "shared")
    state, place, *more = i.operands
    if code.extend(state, "b64", i) is not None:
        raise i.refuse("the state of a barrier")
    addresses = _barrier_address(code, i, place)
    amount = code.read(more[0], "u32", i) if more else None
    if expects and amount is None:
        raise i.refuse("number of operands")

    def step(f: Frame) -> None:
        amounts = f.only(f.v[amount]) if amount is not None else np.ones(f.active, np.uint32)
        for at, n in zip(addresses(f), amounts, strict=True):
            barrier = asynchronous(f.block).barriers[at]
            if expects:
                barrier.expect(int(n))
            barrier.arrive(1 if expects else int(n))

    return _refusing(step)


@instruction("mbarrier.try_wait.parity")
def try_wait(code: Code, i: Instruction) -> Step:
    """It may suspend the thread for a time that is not told: here, until the phase has ended."""
    _form(i, "mbarrier.try_wait.parity", "shared::cta", "shared")
    done, place, parity_operand = i.operands
    passed = code.write(done, "pred", i)
    addresses = _barrier_address(code, i, place)
    parity = code.read(parity_operand, "u32", i)

    def step(f: Frame) -> int | None:
        barriers = asynchronous(f.block).barriers
        pairs = zip(addresses(f), f.only(f.v[parity]).tolist(), strict=True)
        waited = [(barriers[at], wanted) for at, wanted in set(pairs)]

        def ready() -> bool:
            return all(barrier.passed(wanted) for barrier, wanted in waited)

        if not ready():
            return f.wait(ready, then=f.pc)
        f.put_only(passed, np.ones(f.active, np.bool_))
        return None

    return _refusing(step)


def _refusing(step: Step) -> Step:
    def run(f: Frame) -> int | None:
        try:
            return step(f)
        except BarrierError as error:
            raise Refused(str(error)) from None

    return run


# -- copies


@instruction(_COPY)
def copy_box(code: Code, i: Instruction) -> Step:
    """Of a tensor in global memory to shared memory, by one thread."""
    rank, target, *source = i.parts[4:]
    if target not in ("shared::cluster", "shared::cta") or source != ["global", _COMPLETES]:
        raise i.refuse("modifier not known")
    to, tensor, barrier = i.operands
    (place,) = cast(Address, tensor).coordinates
    coordinates = [code.read(c, "s32", i) for c in cast(Vector, place).parts]
    if f"{len(coordinates)}d" != rank:
        raise i.refuse("number of coordinates")
    target_of, map_of = code.address(to, i), code.address(tensor, i)
    barrier_of = _barrier_address(code, i, barrier)

    def step(f: Frame) -> None:
        if f.active != 1:
            raise Refused(f"{f.active} threads start a copy each")
        found = _map_at(f.block, int(map_of(f)[0]))
        first = tuple(int(f.only(f.v[c])[0]) for c in coordinates)
        _start(f.block, found, first, int(target_of(f)[0]), barrier_of(f)[0])

    return _refusing(step)


def _map_at(block: Block, address: int) -> TensorMap:
    if address < PARAM_WINDOW:
        raise Refused(f"a tensor map at {address:#x}, which is no parameter")
    at = address - PARAM_WINDOW
    if at % 64:
        raise Refused(f"a tensor map at {at} of the parameters, which 64 does not divide")
    return unpacked(block.parameters.data[at : at + BYTES].tobytes())


def _start(block: Block, box: TensorMap, first: tuple[int, ...], to: int, barrier: int) -> None:
    if len(first) != len(box.sizes):
        raise Refused(f"{len(first)} coordinates in a tensor of {len(box.sizes)} dims")
    state = asynchronous(block)
    if box.row > 16 and to % (8 * box.row):
        raise Refused(f"a swizzled box is copied to {to:#x}, which {8 * box.row} does not divide")
    target = box.target(to).ravel()

    def copy() -> None:
        address, inside = (part.ravel() for part in box.source(first))
        numbers = np.zeros(address.shape, _NUMBER)
        (numbers[inside],) = block.memory.read(address[inside], _NUMBER)
        state.shared.write_asynchronously(target, numbers)
        state.barriers[barrier].complete(box.bytes)

    if state.late_copies:
        block.pending.append(copy)
    else:
        copy()
