"""Machine code as nvdisasm, which comes with Triton, and AMD's compiler write it: what loops do.

A loop is found in the jumps, not in the order of the text: an instruction is in one if the program
can come from it back to it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton.backends.nvidia

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
MATRIX = ("HGMMA", "HMMA", "v_mfma")
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@\S+)\s+)?([A-Z][\w.]*)([^;]*);")
_AMD_LINE = re.compile(r"^\s+()([a-z]+_\w+)([^;/]*)")
_LABEL = re.compile(r"^(\.L\w+):")


@dataclass
class Block:
    """Instructions that run one after the other.

    Attributes:
        code: Opcode with modifiers, and operands.
        after: Numbers of the blocks that may run next.
    """

    code: list[tuple[str, str]]
    after: list[int]


def disassembled(cubin: bytes) -> str:
    """The text of every function of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "nvdisasm", "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def blocks(text: str) -> list[Block]:
    """The program of one function, cut where jumps come from and go to.

    Raises:
        ValueError: It jumps to where only a register says.
    """
    found, targets, names = [Block([], [])], list[tuple[int, str]](), dict[str, int]()

    def cut(falls_through: bool) -> None:
        if falls_through:
            found[-1].after.append(len(found))
        found.append(Block([], []))

    for line in text.splitlines():
        if label := _LABEL.match(line):
            cut(falls_through=True)
            names[label[1]] = len(found) - 1
        elif match := _LINE.search(line) or _AMD_LINE.match(line):
            predicate, opcode, operands = match.groups()
            found[-1].code.append((opcode, operands.strip()))
            base = opcode.partition(".")[0]
            jumps = base in {"BRA", "BRX", "JMX", "s_branch"} or base.startswith("s_cbranch")
            if jumps:
                # a table of targets follows in a comment
                to = re.findall(r"\.L\w+", operands)
                if not to:
                    raise ValueError(f"{opcode}{operands}: where it jumps is not in the text")
                targets += [(len(found) - 1, name) for name in to]
            if jumps or base in {"EXIT", "RET", "s_endpgm"}:
                # a branch of NVIDIA's may have its condition among the operands
                conditional = (
                    predicate or ("," in operands and base == "BRA") or base.startswith("s_cbranch")
                )
                cut(falls_through=bool(conditional))
    for number, name in targets:
        found[number].after.append(names[name])
    found[-1].after = [x for x in found[-1].after if x < len(found)]
    return found


def loops(program: list[Block]) -> list[list[Block]]:
    """Sets of blocks that can reach each other, in the order of the text; nested ones are one."""
    reach = [_reached(program, number) for number in range(len(program))]
    cycles = {
        tuple(y for y in sorted(reach[x]) if x in reach[y])
        for x in range(len(program))
        if x in reach[x]
    }
    return [[program[x] for x in cycle] for cycle in sorted(cycles)]


def _reached(program: list[Block], start: int) -> set[int]:
    seen, to_visit = set[int](), list(program[start].after)
    while to_visit:
        here = to_visit.pop()
        if here not in seen:
            seen.add(here)
            to_visit += program[here].after
    return seen


def opcodes(loop: list[Block]) -> list[str]:
    return [opcode for block in loop for opcode, _ in block.code]


def main_loop(text: str) -> list[tuple[str, str]]:
    """The loop that multiplies most, the shortest of those: the one without masks."""

    def order(code: list[tuple[str, str]]) -> tuple[int, int]:
        return -sum(opcode.startswith(MATRIX) for opcode, _ in code), len(code)

    return min(
        ([x for block in loop for x in block.code] for loop in loops(blocks(text))), key=order
    )


def local_accesses(text: str) -> int:
    """Instructions that read or write local memory, a thread's spilled registers, in loops."""
    return sum(
        opcode.partition(".")[0] in {"LDL", "STL"}
        for loop in loops(blocks(text))
        for opcode in opcodes(loop)
    )
