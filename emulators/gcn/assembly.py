"""Kernels in the device assembly that clang keeps: instructions, labels, set-up, arguments.

Source: LLVM, "User Guide for AMDGPU Backend", sections "Instructions", "AMDHSA Kernel Directives",
"Code Object V5 Metadata".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ENCODINGS = ("e32", "e64", "sdwa", "dpp")
_MODIFIER = re.compile(
    r"\s(\w+):(\[[^\]]*\]|\S+)$"
    r"|\s(glc|slc|sc0|sc1|nt|clamp|offen|row_(?:half_)?mirror)$"
)
_LABEL = re.compile(r"^(\.L\w+):")


class Unknown(NotImplementedError):
    """The interpreter does not know this, and does not guess."""


@dataclass(frozen=True)
class Instruction:
    """One line of assembly.

    Attributes:
        name: Mnemonic without its encoding.
        encoding: One of ENCODINGS or "".
        modifiers: What follows the operands: ``offset:16``; "" for those without a value.
    """

    name: str
    encoding: str
    operands: tuple[str, ...]
    modifiers: dict[str, str]
    text: str
    line: int

    def number(self, modifier: str) -> int:
        """The value of a modifier, 0 where there is none."""
        return int(self.modifiers.get(modifier, "0"), 0)

    def bits(self, modifier: str, default: int) -> tuple[int, ...]:
        """A modifier such as ``op_sel:[0,1]``, one bit for each source."""
        given = self.modifiers.get(modifier)
        if given is None:
            return (default,) * 3
        return tuple(int(bit) for bit in given.strip("[]").split(","))

    def allow(self, *modifiers: str) -> None:
        unknown = self.modifiers.keys() - set(modifiers)
        if unknown:
            raise Unknown(f"modifiers {sorted(unknown)} of {self.text!r}")


@dataclass(frozen=True)
class Argument:
    """A kernel's argument in its segment."""

    offset: int
    size: int
    kind: str


@dataclass(frozen=True)
class Kernel:
    """One kernel of one target.

    Attributes:
        target: "gfx90a" or "gfx942".
        instructions: In the order of their addresses.
        labels: Index of the instruction behind each.
        directives: ``.amdhsa_*``, without that prefix.
    """

    name: str
    target: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    directives: dict[str, int]
    arguments: tuple[Argument, ...]


def parse_line(text: str, line: int = 0) -> Instruction:
    code = rest = text.partition(";")[0].strip()
    modifiers: dict[str, str] = {}
    if not rest.startswith("s_waitcnt"):
        while (found := _MODIFIER.search(rest)) is not None:
            modifiers[found[1] or found[3]] = found[2] or ""
            rest = rest[: found.start()].rstrip()
    mnemonic, _, operands = rest.partition(" ")
    name, _, encoding = mnemonic.rpartition("_")
    if encoding not in ENCODINGS:
        name, encoding = mnemonic, ""
    split = tuple(part.strip() for part in operands.split(",")) if operands else ()
    return Instruction(name, encoding, split, modifiers, code, line)


def parse_body(text: str, first_line: int = 1) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions and labels of a function's text."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line, row in enumerate(text.splitlines(), first_line):
        label = _LABEL.match(row)
        if label is not None:
            labels[label[1]] = len(instructions)
            continue
        code = row.partition(";")[0].strip()
        if code and not code.startswith(".") and not code.endswith(":"):
            instructions.append(parse_line(code, line))
    return instructions, labels


class Assembly:
    """A file of device assembly.

    Args:
        text: Its contents, for tests that change them.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        target = re.search(r'\.amdgcn_target "\S*-(gfx\w+)', text)
        if target is None:
            raise Unknown("assembly without .amdgcn_target")
        self.target = target[1]

    @classmethod
    def of(cls, path: Path) -> Assembly:
        return cls(path.read_text())

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Mangled names of its kernels."""
        return tuple(re.findall(r"(?m)^\s*\.amdhsa_kernel (\S+)$", self.text))

    def kernel(self, name: str) -> Kernel:
        """The kernel of this mangled name."""
        start = self.text.index(f"\n{name}:")
        end = self.text.index("\n.Lfunc_end", start)
        body = self.text[start:end]
        instructions, labels = parse_body(body, self.text.count("\n", 0, start) + 1)
        return Kernel(
            name,
            self.target,
            tuple(instructions),
            labels,
            self._directives(name),
            self._arguments(name),
        )

    def _directives(self, name: str) -> dict[str, int]:
        start = self.text.index(f".amdhsa_kernel {name}\n")
        block = self.text[start : self.text.index(".end_amdhsa_kernel", start)]
        found = re.findall(r"(?m)^\s*\.amdhsa_(\w+) (\d+)$", block)
        return {key: int(value) for key, value in found}

    def _arguments(self, name: str) -> tuple[Argument, ...]:
        metadata = self.text[self.text.index("\namdhsa.kernels:") :]
        end = metadata.index(f"    .name:           {name}\n")
        block = metadata[metadata.rindex("\n  - ", 0, end) : end]
        found = re.findall(
            r"\.offset: +(\d+)\n +\.size: +(\d+)\n +\.value_kind: +(\w+)",
            re.sub(r"\n +\.(actual_access|address_space|is_const|name): [^\n]*", "", block),
        )
        return tuple(Argument(int(offset), int(size), kind) for offset, size, kind in found)
