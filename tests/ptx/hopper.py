"""What a block of sm_90a has beyond other blocks: barriers that count bytes, tensor copies.

Source: PTX ISA 9.0, sections 9.7.9.27, "cp.async.bulk.tensor", 9.7.13.15, "mbarrier", 9.7.13.4,
"fence", 9.7.13.10, "elect.sync", and 9.7.19.5, "setmaxnreg".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np

from .machine import Block, Machine
from .mbarrier import MARK, BarrierError, Barriers
from .memory import PARAM_WINDOW
from .parse import Address, Immediate, Instruction, Operand, Pair, Refused, Vector
from .table import Step, instruction
from .tensor_map import BYTES, TensorMap, unpacked

if TYPE_CHECKING:
    from .frame import Frame
    from .program import Code

_MARK = np.dtype("<u8")
_NUMBER = np.dtype("<u2")
_REGISTERS = 65536  # of a multiprocessor


@dataclass
class Asynchronous:
    """Of one block.

    Attributes:
        late_copies, late_products: Whether what runs on by itself is done as late as it may be, or
            at once.
        free: Registers that nobody has.
        owned: Registers of a thread of each warp.
        checks: To be done once the block has ended.
    """

    late_copies: bool
    late_products: bool
    free: int = 0
    owned: dict[int, int] = field(default_factory=dict)
    barriers: Barriers = field(default_factory=Barriers)
    products: dict[int, object] = field(default_factory=dict)


def asynchronous(block: Block) -> Asynchronous:
    return cast(Asynchronous, block.state["asynchronous"])


class HopperMachine(Machine):
    """Runs a kernel of sm_90a.

    Args:
        late_copies, late_products: As in ``Asynchronous``.
    """

    def __init__(self, *args, late_copies: bool = True, late_products: bool = True, **rest) -> None:
        super().__init__(*args, **rest)
        self._late = late_copies, late_products

    def _run(self, block: Block, frames: list[Frame], grid: tuple[int, int, int]) -> None:
        found = Asynchronous(*self._late)
        block.state["asynchronous"] = found
        each = _initial_registers(frames[0].program.entry, block.threads)
        found.owned = dict.fromkeys(range(block.threads // 32), each)
        super()._run(block, frames, grid)
        if not found.barriers.idle():
            raise Refused(f"block {block.index} ended while a barrier waits for bytes")
        for first, products in found.products.items():
            if products:
                raise Refused(f"block {block.index}: products of thread {first} run on at its end")


def _initial_registers(entry, threads: int) -> int:
    """As .maxnreg has it, or as many as are there for every thread."""
    import re

    found = re.search(r"\.maxnreg\s+(\d+)", entry.header)
    return int(found[1]) if found else min(255, _REGISTERS // threads // 8 * 8)


# -- one thread of a warp


@instruction("elect.sync", whole_warps=True)
def elect(code: Code, i: Instruction) -> Step:
    """The first thread of each warp; the others are told its lane."""
    pair, mask = i.operands
    if i.parts != ("elect", "sync") or mask != Immediate("-1") or not isinstance(pair, Pair):
        raise i.refuse("form not known")
    lane = code.extend(pair.first, "b32", i)
    chosen = code.write(pair.second, "pred", i)

    def step(f: Frame) -> None:
        f.put(lane, np.zeros(f.threads, np.uint32))
        f.put(chosen, f.lanes == 0)

    return step


@instruction("setmaxnreg", whole_warps=True)
def change_registers(code: Code, i: Instruction) -> Step:
    """Gives registers back, or waits until there are enough."""
    grows = i.parts[1] == "inc"
    if i.parts[1:] not in (("inc", "sync", "aligned", "u32"), ("dec", "sync", "aligned", "u32")):
        raise i.refuse("modifier not known")
    (operand,) = i.operands
    wanted = int(cast(Immediate, operand).text)
    if wanted % 8 or not 24 <= wanted <= 256:
        raise i.refuse("a number of registers that is not allowed")

    def step(f: Frame) -> int | None:
        state = asynchronous(f.block)
        warps = [f.first // 32 + int(n) for n in np.flatnonzero(f.warps())]
        owned = {state.owned[warp] for warp in warps}
        if any(before > wanted if grows else before < wanted for before in owned):
            raise Refused(f"from {owned} registers to {wanted}")
        needed = sum(32 * (wanted - state.owned[warp]) for warp in warps)
        if needed > state.free:
            return f.wait(lambda: needed <= state.free, then=f.pc)
        state.free -= needed
        state.owned |= dict.fromkeys(warps, wanted)
        return None

    return step


@instruction("fence.proxy.async")
def fence_proxies(code: Code, i: Instruction) -> Step:
    """Generic accesses before it come before asynchronous ones behind it."""
    if i.parts[3:] not in ((), ("shared::cta",)):
        raise i.refuse("modifier not known")
    return lambda f: None


# -- barriers


def _barrier_address(code: Code, i: Instruction, operand: Operand):
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


_COPY = "cp.async.bulk.tensor"
_COMPLETES = "mbarrier::complete_tx::bytes"


@instruction(_COPY)
def copy_box(code: Code, i: Instruction) -> Step:
    """Of a tensor in global memory to shared memory, by one thread."""
    rank, target, *rest = i.parts[4:]
    source = [part for part in rest if part != "tile"]
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
        block.shared.write(target, [numbers])
        state.barriers[barrier].complete(box.bytes)

    if state.late_copies:
        block.pending.append(copy)
    else:
        copy()
