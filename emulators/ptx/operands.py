"""One instruction as data.

Source: PTX ISA, "Instruction Statements" and "Instruction Operands".
"""

from __future__ import annotations

from dataclasses import dataclass


class Refused(Exception):
    """The interpreter does not know this, or the program may not do it."""


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Immediate:
    text: str


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter or a variable in shared memory."""

    name: str


@dataclass(frozen=True)
class Vector:
    """``{a, b}``"""

    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """``d|p``: two destinations."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Negated:
    """``!p``"""

    of: Operand


@dataclass(frozen=True)
class Address:
    """``[base + offset]``; a tensor's has its coordinates behind the base."""

    base: Operand
    offset: int = 0
    coordinates: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Sink:
    """``_``: the result is not wanted."""


Operand = Register | Immediate | Symbol | Vector | Pair | Negated | Address | Sink


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``guard`` is the predicate's name and whether it is negated."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None
    text: str

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.split("."))

    def refuse(self, why: str) -> Refused:
        return Refused(f"{why}: {self.text}")
