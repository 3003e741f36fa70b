"""A kernel made ready to run: one step for each instruction."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from .frame import Frame
from .memory import SHARED_WINDOW, Memory, Region
from .parse import Address, Entry, Immediate, Instruction, Operand, Refused, Register, Symbol
from .registers import Array, Registers
from .table import Step, guarded, maker

# Shared memory begins behind what the driver keeps for itself, as on sm_90.
SHARED_BASE = 1024
Space = Callable[["Frame", Array], "Memory | Region"]


class Code:
    """What the makers of steps may ask about the kernel.

    Attributes:
        shared_bytes: Of the variables whose size the kernel knows.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry, self.body = entry, entry.body
        self.registers = Registers(self.body)
        self.parameters: dict[str, int] = {}
        self._symbols: dict[str, int] = {}
        self.parameter_bytes = 0
        for variable in entry.parameters:
            at = -(-self.parameter_bytes // variable.align) * variable.align
            assert variable.size is not None
            self.parameters[variable.name] = at
            self.parameter_bytes = at + variable.size
        self.shared_bytes = 0
        variables = [*entry.module_shared, *self.body.shared]
        for variable in sorted(variables, key=lambda variable: variable.size is None):
            at = -(-self.shared_bytes // variable.align) * variable.align
            self._symbols[variable.name] = SHARED_BASE + at
            self.shared_bytes = at + (variable.size or 0)
        self._symbols |= self.parameters

    def read(self, operand: Operand, kind: str, i: Instruction) -> int:
        """The slot of a source operand of just that width; a variable's is its address."""
        if isinstance(operand, Symbol):
            return self.registers.constant(self.symbol(operand.name, i), kind)
        return self.registers.read(operand, kind, i)

    def read_low(self, operand: Operand, kind: str, i: Instruction) -> int:
        """The slot of the low bits of a source operand that may be wider."""
        return self.registers.read(operand, kind, i, wider=True)

    def write(self, operand: Operand, kind: str, i: Instruction) -> int:
        """The slot of a destination of just that width."""
        return self.registers.write(operand, kind, i)

    def extend(self, operand: Operand, kind: str, i: Instruction) -> int | None:
        """The slot of a destination that may be wider; None where it is not wanted."""
        return self.registers.extend(operand, kind, i)

    def symbol(self, name: str, i: Instruction) -> int:
        if name not in self._symbols:
            raise i.refuse(f"no variable {name}")
        return self._symbols[name]

    def number(self, operand: Operand, i: Instruction) -> int:
        """An operand that must be a constant."""
        if not isinstance(operand, Immediate):
            raise i.refuse(f"{operand} is no constant")
        return int(operand.text.removesuffix("U"), 0)

    def label(self, operand: Operand, i: Instruction) -> int:
        if not isinstance(operand, Symbol) or operand.name not in self.body.labels:
            raise i.refuse(f"no label {operand}")
        return self.body.labels[operand.name]

    def address(self, operand: Operand, i: Instruction) -> Callable[[Frame], Array]:
        """What gives the address of each thread that runs, without a tensor's coordinates."""
        if not isinstance(operand, Address):
            raise i.refuse(f"{operand} is no address")
        if isinstance(operand.base, Register):
            wide = self.registers.bank(operand.base.name) == 8
            slot = self.registers.read(operand.base, "u64" if wide else "u32", i)
            offset = operand.offset
            return lambda f: f.only(f.v[slot]).astype(np.int64) + offset
        base = (
            int(operand.base.text.removesuffix("U"), 0)
            if isinstance(operand.base, Immediate)
            else self.symbol(operand.base.name, i)  # type: ignore[union-attr]
        )
        return lambda f: np.full(f.active, base + operand.offset, np.int64)

    def space(self, name: str | None, i: Instruction) -> Space:
        """The memory of a state space; None is generic addresses."""
        if name in ("global", None):
            return (lambda f, _: f.block.memory) if name else _generic
        if name in ("shared", "shared::cta"):
            return lambda f, _: f.block.shared
        if name == "param":
            return lambda f, _: f.block.parameters
        raise i.refuse(f"state space not known: {name}")


def _generic(f: Frame, addresses: Array) -> Memory | Region:
    if len(addresses) and int(addresses.max()) >= SHARED_WINDOW:
        raise Refused("a generic address that is not in global memory")
    return f.block.memory


class Program:
    """The steps of an entry.

    Attributes:
        steps: One for each instruction, and one behind the last that refuses.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.code = Code(entry)
        self.registers = self.code.registers
        self.instructions = entry.body.code
        self.steps = [self._step(i) for i in self.instructions]
        self.steps.append(_behind_the_end)
        self._frames: dict[tuple[int, int], list[Frame]] = {}

    def frames(self, threads: int, width: int) -> list[Frame]:
        """The threads of a block, ``width`` in lockstep; each block starts them again."""
        if (threads, width) not in self._frames:
            firsts = range(0, threads, width)
            self._frames[threads, width] = [
                Frame(self, first, min(width, threads - first)) for first in firsts
            ]
        return self._frames[threads, width]

    def _step(self, i: Instruction) -> Step:
        step = maker(i)(self.code, i)
        if i.guard is None:
            return step
        name, negated = i.guard
        return guarded(step, self.registers.read(Register(name), "pred", i), negated)

    def instruction(self, pc: int) -> str:
        return self.instructions[pc].text if pc < len(self.instructions) else "the end"


@functools.cache
def program(entry: Entry) -> Program:
    """Made once for each kernel."""
    return Program(entry)


def _behind_the_end(f: Frame) -> int | None:
    raise Refused("a thread ran behind the last instruction")
