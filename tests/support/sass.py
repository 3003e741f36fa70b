"""Machine code as nvdisasm, which comes with Triton, and AMD's compiler write it: what loops do.

A loop is found in the jumps, not in the order of the text: an instruction is in one if the program
can come from it back to it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton.backends.nvidia

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "v_mfma")
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


def functions(text: str) -> dict[str, str]:
    """The functions of a disassembled cubin, or of clang's assembly, by their mangled names."""
    found = dict[str, str]()
    for section in re.split(r"(?m)^\s*\.section\s+\.text\.", text)[1:]:
        name = re.split(r"[^\w$]", section, maxsplit=1)[0]
        found.setdefault(name, re.split(r"(?m)^\.Lfunc_end", section)[0])  # clang comes back to it
    return found


def loops(program: list[Block]) -> list[list[Block]]:
    """Sets of blocks that can reach each other, in the order of the text; nested ones are one."""
    return [
        [program[x] for x in sorted(loop)] for loop in _cycles(program, set(range(len(program))))
    ]


def _cycles(program: list[Block], inside: set[int]) -> list[set[int]]:
    reach = {number: _reached(program, number, inside) for number in inside}
    found = {frozenset(y for y in reach[x] if x in reach[y]) for x in inside if x in reach[x]}
    return sorted(map(set, found), key=min)


def _reached(program: list[Block], start: int, inside: set[int]) -> set[int]:
    seen, to_visit = set[int](), inside & set(program[start].after)
    while to_visit:
        here = to_visit.pop()
        seen.add(here)
        to_visit |= inside & set(program[here].after) - seen
    return seen


def _nested(program: list[Block], inside: set[int]) -> Iterator[tuple[int, set[int]]]:
    """Loops, and those in them that do not pass where they begin; each with that block."""
    for loop in _cycles(program, inside):
        outside = [block for x, block in enumerate(program) if x not in loop]
        entries = [x for x in sorted(loop) if any(x in block.after for block in outside)]
        first = entries[0] if entries else min(loop)
        yield first, loop
        yield from _nested(program, loop - {first})


def _round(program: list[Block], first: int, loop: set[int]) -> list[tuple[str, str]]:
    """From a loop's first block back to it, by the way that meets most of ``_MET``.

    And a block with exponentials: what clang writes for "if, else" may be passed without either, or
    with both. Of ways that meet the same, the shortest. Loops inside are passed once at most.
    """
    order, open_ = list[int](), set[int]()
    onward: dict[int, list[int]] = {}
    stack = [first]
    while stack:
        here = stack[-1]
        if here not in onward:
            open_.add(here)
            # what is open lies before it: no way leads there without a round
            onward[here] = [x for x in program[here].after if x in loop and x not in open_]
        below = [x for x in onward[here] if x not in onward]
        if below:
            stack.append(below[0])
        else:
            open_.discard(here)
            order.append(stack.pop())
    best: dict[int, dict[bool, tuple[int, list[int]]]] = {}  # by whether exponentials are met
    for here in order:
        code = program[here].code
        exponentials = sum(opcode.startswith(("MUFU", "v_exp")) for opcode, _ in code) >= 4
        onwards = [item for x in onward[here] for item in best[x].items()]
        if first in program[here].after:
            onwards.append((False, (0, [])))
        best[here] = {}
        for met, (cost, way) in onwards:
            met = met or exponentials
            found = cost + sum(map(_cost, code)), [here, *way]
            best[here][met] = min(found, best[here].get(met, found))
    _, way = best[first].get(True) or best[first][False]
    return [x for number in way for x in program[number].code]


# Worth a way around: products, and copies of tiles to shared memory or registers.
_MET = {"HGMMA": 2000, "HMMA": 2000, "v_mfma": 2000, "LDGSTS": 60}
_MET |= {"global_load_dwordx4": 60, "buffer_load": 60, "ds_write_b128": 20}


def _cost(instruction: tuple[str, str]) -> int:
    opcode = instruction[0]
    return 1 - next((worth for name, worth in _MET.items() if opcode.startswith(name)), 0)


def opcodes(loop: list[Block]) -> list[str]:
    return [opcode for block in loop for opcode, _ in block.code]


def main_loop(text: str) -> list[tuple[str, str]]:
    """A round of the loop over whole tiles of a function: no mask, and a next tile to load."""
    program = blocks(text)
    return _main_loop(program)[1]


def _main_loop(program: list[Block]) -> tuple[set[int], list[tuple[str, str]]]:
    """Its blocks, and a round of it.

    It is the one with most products for its length; of a loop around it, which may hold as many for
    nearly the same, a round is longer.
    """
    found = list[tuple[float, set[int], list[tuple[str, str]]]]()
    for first, loop in _nested(program, set(range(len(program)))):
        code = _round(program, first, loop)
        products = sum(opcode.startswith(MATRIX) for opcode, _ in code)
        found.append((products / max(1, len(code)), loop, code))
    top = max(ratio for ratio, _, _ in found)
    best = (row for row in found if row[0] >= 0.97 * top)
    return min(((loop, code) for _, loop, code in best), key=lambda row: len(row[1]))


def local_in_main_loop(text: str) -> int:
    """As ``local_accesses``, masks and all, but not in loops around it, as of a dispatcher."""
    program = blocks(text)
    loop = _main_loop(program)[0]
    return sum(map(_is_local, opcodes([program[x] for x in loop])))


def local_accesses(text: str) -> int:
    """Instructions that read or write local memory, a thread's spilled registers, in loops."""
    return sum(_is_local(opcode) for loop in loops(blocks(text)) for opcode in opcodes(loop))


def _is_local(opcode: str) -> bool:
    return opcode.partition(".")[0] in {"LDL", "STL"}
