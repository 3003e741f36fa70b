"""A launch: workgroups one after another, their waves each as far as it can.

Sources: "CDNA3 ISA" 3.13 "Initial Wave State"; LLVM, "User Guide for AMDGPU Backend", "Initial
Kernel Execution State" and "Kernel Descriptor".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from . import buffers, lanes, matrix, packed, scalar, scratch, transfers, vector
from .assembly import Instruction, Kernel, Unknown, parse_body
from .memory import Lds, Memory
from .operands import registers_of
from .scalar import BARRIER, STOP, Step
from .wave import LANES, VCC, Hazard, Wave

# User registers in their order, with how many each takes.
_USER = (
    ("private_segment_buffer", 4),
    ("dispatch_ptr", 2),
    ("queue_ptr", 2),
    ("kernarg_segment_ptr", 2),
    ("dispatch_id", 2),
    ("flat_scratch_init", 2),
    ("private_segment_size", 1),
)
_LDS_LIMIT = 64 * 1024
STEPS_OF_A_WAVE = 3_000_000  # before it is called endless


@dataclass(frozen=True)
class Order:
    """How the machine takes what the program leaves open.

    Attributes:
        late: Transfers happen as late as they may, or at once.
        descending: The last wave runs first.
    """

    late: bool = True
    descending: bool = False


class Program:
    """Instructions, each of them decoded when it is first reached.

    Attributes:
        steps: What each of them does.
        touched: The registers that each of them needs to be at rest.
    """

    def __init__(
        self, instructions: Sequence[Instruction], labels: dict[str, int], where: str = ""
    ) -> None:
        self._instructions, self._labels, self.where = instructions, labels, where
        self.steps: list[Step | None] = [None] * len(instructions)
        self.touched: list[frozenset[int]] = [frozenset()] * len(instructions)

    @classmethod
    def of_text(cls, text: str) -> Program:
        return cls(*parse_body(text))

    def decode(self, at: int) -> Step:
        step = build(self._instructions[at], self._labels)
        self.steps[at], self.touched[at] = step, touched(self._instructions[at])
        return step

    def place(self, at: int) -> str:
        instruction = self._instructions[at]
        return f"{self.where} line {instruction.line}, {instruction.text!r}"


@dataclass(frozen=True)
class Launchable:
    """A kernel and its program."""

    kernel: Kernel
    program: Program

    @classmethod
    def of(cls, kernel: Kernel) -> Launchable:
        where = f"{kernel.target} {kernel.name}"
        return cls(kernel, Program(kernel.instructions, kernel.labels, where))

    def run(
        self,
        arguments: list[bytes],
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        memory: Memory,
        order: Order,
    ) -> None:
        """Launch it.

        Args:
            arguments: The bytes of each of the kernel's parameters.
            threads: Of a workgroup, along x.
            shared_bytes: LDS on top of what the kernel has by itself.
        """
        size = self.kernel.directives["group_segment_fixed_size"] + shared_bytes
        if size > _LDS_LIMIT:
            raise Hazard(f"asks for {size} bytes of LDS, of {_LDS_LIMIT}")
        segment = self._segment(arguments, _hidden(grid, threads, shared_bytes))
        address = memory.allow_bytes(segment)
        gfx90a = self.kernel.target == "gfx90a"
        own = self.kernel.directives["private_segment_fixed_size"]
        for z, y, x in np.ndindex(*grid[::-1]):
            lds = Lds(size)
            waves = []
            for first in range(0, threads, LANES):
                wave = Wave(memory, lds, order.late, gfx90a, own)
                self._set_up(wave, address, (x, y, z), first, threads)
                waves.append(wave)
            run_waves(self.program, waves[::-1] if order.descending else waves)

    def _segment(self, arguments: list[bytes], hidden: dict[str, int]) -> np.ndarray:
        layout = self.kernel.arguments
        given = [argument for argument in layout if not argument.kind.startswith("hidden_")]
        kinds = {argument.kind for argument in layout}
        if kinds - {"by_value", "global_buffer"} - hidden.keys():
            raise Unknown(f"arguments of kind {sorted(kinds)} in {self.kernel.name}")
        sizes = [len(x) for x in arguments]
        if sizes != [argument.size for argument in given]:
            raise Unknown(f"arguments of {sizes} bytes for {self.kernel.name}: {given}")
        contents = dict(zip(given, arguments, strict=True))
        contents |= {
            x: hidden[x.kind].to_bytes(x.size, "little") for x in layout if x.kind in hidden
        }
        segment = np.zeros(self.kernel.directives["kernarg_size"], np.uint8)
        for argument, content in contents.items():
            place = slice(argument.offset, argument.offset + argument.size)
            segment[place] = np.frombuffer(content, np.uint8)
        return segment

    def _set_up(
        self, wave: Wave, segment: int, group: tuple[int, ...], first: int, threads: int
    ) -> None:
        directives = self.kernel.directives
        if directives["uses_dynamic_stack"]:
            raise Unknown(f"scratch memory in {self.kernel.name}")
        at = 0
        for name, count in _USER:
            if directives.get(f"user_sgpr_{name}"):
                if name == "kernarg_segment_ptr":
                    wave.set_pair(at, segment)
                at += count
        # such a kernel begins with what loads them itself, where the firmware does not
        at += directives["user_sgpr_kernarg_preload_length"]
        if at != directives["user_sgpr_count"]:
            raise Unknown(f"{directives['user_sgpr_count']} user registers, {at} of them known")
        for axis, index in zip("xyz", group, strict=True):
            if directives[f"system_sgpr_workgroup_id_{axis}"]:
                wave.s[at] = index
                at += 1
        if directives["system_vgpr_workitem_id"]:
            raise Unknown(f"work items in more than one dimension in {self.kernel.name}")
        wave.u32[0][:] = np.arange(first, first + LANES)
        if threads - first < LANES:
            wave.exec = (1 << (threads - first)) - 1


def _hidden(grid: tuple[int, int, int], threads: int, shared_bytes: int) -> dict[str, int]:
    """What a runtime adds to a kernel's arguments."""
    found = {"hidden_grid_dims": 3, "hidden_dynamic_lds_size": shared_bytes}
    for axis, blocks, size in zip("xyz", grid, (threads, 1, 1), strict=True):
        found |= {f"hidden_block_count_{axis}": blocks, f"hidden_group_size_{axis}": size}
        found |= {f"hidden_remainder_{axis}": 0, f"hidden_global_offset_{axis}": 0}
    return found


def run_waves(program: Program, waves: list[Wave], steps: int = STEPS_OF_A_WAVE) -> None:
    """A workgroup's waves, in this order from barrier to barrier."""
    with np.errstate(all="ignore"):
        while waves:
            waves = [wave for wave in waves if _run(program, wave, steps) is BARRIER]


def _run(program: Program, wave: Wave, steps: int) -> object:
    """To the next barrier, or the end."""
    todo, registers, pending = program.steps, program.touched, wave.pending
    for _ in range(steps):
        at = wave.pc
        wave.pc = at + 1
        try:
            step = todo[at] or program.decode(at)
            if pending and not pending.isdisjoint(registers[at]):
                raise Hazard("a register is still under way")
            said = step(wave)
        except (Hazard, Unknown) as problem:
            raise type(problem)(f"{program.place(at)}: {problem}") from problem
        if said is STOP:
            wave.await_vector(0)
            wave.await_local(0)
        if said is STOP or said is BARRIER:
            return said
    raise Hazard(f"{program.where} does not end in {steps} steps")


def touched(instruction: Instruction) -> frozenset[int]:
    """Every register that an instruction reads or writes, VCC too where it is not named.

    What a load will write is not among them: see ``Wave.transfer``.
    """
    found = registers_of(instruction, skip=int(transfers.loads(instruction)))
    implicit = "_vcc" in instruction.name or "div_fmas" in instruction.name
    return found | {VCC, VCC + 1} if implicit else found


def build(instruction: Instruction, labels: dict[str, int]) -> Step:
    """What an instruction does.

    Raises:
        Unknown: the interpreter has no semantics for it, or for its operands.
    """
    try:
        for step in _steps(instruction, labels):
            if step is not None:
                return step
    except (Unknown, KeyError, ValueError) as problem:
        raise Unknown(f"{instruction.text!r}: {problem!r}") from problem
    raise Unknown(f"{instruction.text!r} of line {instruction.line}")


def _steps(instruction: Instruction, labels: dict[str, int]) -> Iterator[Step | None]:
    yield scalar.build(instruction, labels)
    for part in (vector, lanes, packed, matrix, transfers, buffers, scratch):
        yield part.build(instruction)
