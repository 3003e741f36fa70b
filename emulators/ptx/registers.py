"""Registers of the threads of a frame as rows of bits, and typed views of them.

Source: PTX ISA, "Fundamental Types" and "Operand Size Exceeding Instruction-Type Size": a register
has a width and no type; an instruction reads the low bits that it wants, and what it writes is
extended to the register's width, with the sign for signed types.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from .parse import Body, Immediate, Instruction, Operand, Refused, Register, Sink

Array = np.ndarray[Any, Any]

_NUMPY = {"pred": "?", "f16": "<f2", "f32": "<f4", "f64": "<f8", "bf16": "<u2"}
_NUMPY |= {"f16x2": "<u4", "bf16x2": "<u4"}
_NUMPY |= {f"{kind}{8 * size}": f"<u{size}" for kind in "bu" for size in (1, 2, 4, 8)}
_NUMPY |= {f"s{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)}
TYPES: dict[str, np.dtype[Any]] = {name: np.dtype(code) for name, code in _NUMPY.items()}
_POISON = 0xFF  # NaN in every format


def is_float(kind: str) -> bool:
    return "f" in kind


def is_signed(kind: str) -> bool:
    return kind[0] == "s"


def unsigned(kind: str) -> str:
    """The type of the same width in which sums wrap."""
    return f"u{8 * TYPES[kind].itemsize}"


def immediate(text: str, kind: str) -> Any:
    """A constant's value as a number of the type; None where that takes none so written.

    Source: PTX ISA, "Constants": 0f and 0d are followed by the bits of a float or double.
    """
    size = TYPES[kind].itemsize
    if text[:2] in ("0f", "0F"):
        bits = int(text[2:], 16)
        return _bits(bits, kind) if size == 4 else None
    if text[:2] in ("0d", "0D"):
        return _bits(int(text[2:], 16), kind) if size == 8 else None
    value = int(text.removesuffix("U"), 0)
    if kind == "pred":
        return value != 0
    return None if is_float(kind) else _bits(value & ((1 << 8 * size) - 1), kind)


def _bits(bits: int, kind: str) -> Any:
    size = TYPES[kind].itemsize
    return np.frombuffer(struct.pack("<Q", bits)[:size], TYPES[kind])[0]


@dataclass(frozen=True)
class _Slot:
    """How a frame makes an array of one value a thread."""

    kind: str  # register, constant, special
    name: str
    dtype: np.dtype[Any]
    bits: bytes = b""


class Registers:
    """Numbers the arrays that a kernel's instructions read and write."""

    def __init__(self, body: Body) -> None:
        self.kinds = body.registers
        self.banks = {
            name: TYPES[kind].itemsize if kind != "pred" else 0
            for name, kind in body.registers.items()
            if kind in TYPES
        }
        self.rows: dict[str, int] = {}  # of the bank of their width
        self.counts: dict[int, int] = {}
        self.slots: list[_Slot] = []
        self._numbers: dict[tuple[str, str, bytes], int] = {}
        for name, kind in body.registers.items():
            if kind not in TYPES:
                raise Refused(f"register {name} has a type that is not known: {kind}")
            bank = self.bank(name)
            self.rows[name] = self.counts.get(bank, 0)
            self.counts[bank] = self.rows[name] + 1

    def bank(self, name: str) -> int:
        """Bytes of a register; 0 for a predicate."""
        return self.banks[name]

    def _number(self, kind: str, name: str, of: str, bits: bytes = b"") -> int:
        dtype = TYPES[of]
        key = (name, dtype.str, bits)
        found = self._numbers.get(key)
        if found is None:
            found = self._numbers[key] = len(self.slots)
            self.slots.append(_Slot(kind, name, dtype, bits))
        return found

    def constant(self, value: Any, kind: str) -> int:
        return self._number("constant", "", kind, TYPES[kind].type(value).tobytes())

    def read(self, operand: Operand, kind: str, i: Instruction, wider: bool = False) -> int:
        """The slot that has a source operand as ``kind``.

        Args:
            wider: Whether a register may be wider, of which the low bits are read.
        """
        if isinstance(operand, Immediate):
            value = immediate(operand.text, kind)
            if value is None:
                raise i.refuse(f"{operand.text} is no constant of type {kind}")
            return self.constant(value, kind)
        if not isinstance(operand, Register):
            raise i.refuse(f"{operand} is no source of type {kind}")
        if operand.name not in self.kinds:
            return self._number("special", operand.name, kind)
        self._check_kind(operand.name, kind, i)
        width = max(1, self.bank(operand.name))
        if width < TYPES[kind].itemsize or (width > TYPES[kind].itemsize and not wider):
            raise i.refuse(f"{operand.name} has not the width of {kind}")
        return self._number("register", operand.name, kind)

    def write(self, operand: Operand, kind: str, i: Instruction) -> int:
        """The slot to put results of ``kind`` into, of that width."""
        if not isinstance(operand, Register) or operand.name not in self.kinds:
            raise i.refuse(f"{operand} is no destination")
        self._check_kind(operand.name, kind, i)
        if max(1, self.bank(operand.name)) != TYPES[kind].itemsize:
            raise i.refuse(f"{operand.name} has not the width of {kind}")
        return self._number("register", operand.name, kind)

    def extend(self, operand: Operand, kind: str, i: Instruction) -> int | None:
        """Like ``write`` for instructions whose destination may be wider, or not wanted."""
        if isinstance(operand, Sink):
            return None
        if isinstance(operand, Register) and operand.name in self.kinds and not is_float(kind):
            width = 8 * self.bank(operand.name)
            if width > 8 * TYPES[kind].itemsize:
                kind = f"{'s' if is_signed(kind) else 'u'}{width}"
        return self.write(operand, kind, i)

    def _check_kind(self, name: str, kind: str, i: Instruction) -> None:
        if (kind == "pred") != (self.kinds[name] == "pred"):
            raise i.refuse(f"{name} is of type {self.kinds[name]}, wanted is {kind}")


class RegisterFile:
    """The registers of the threads of one frame.

    Attributes:
        arrays: One value a thread for each slot.
    """

    def __init__(self, registers: Registers, threads: int) -> None:
        self._slots = registers.slots
        self._banks = {
            size: np.empty((count, threads * max(1, size)), np.uint8)
            for size, count in registers.counts.items()
        }
        self.arrays: list[Array] = []
        for slot in registers.slots:
            if slot.kind == "register":
                size = registers.bank(slot.name)
                row = self._banks[size][registers.rows[slot.name]].view(slot.dtype)
                self.arrays.append(row[:: max(1, size) // slot.dtype.itemsize])
            else:
                value = np.frombuffer(slot.bits or bytes(slot.dtype.itemsize), slot.dtype)
                self.arrays.append(np.repeat(value, threads))

    def reset(self, special: dict[str, Any]) -> None:
        """Poison what instructions write.

        Args:
            special: Values of the special registers, one for all threads or one for each.
        """
        for size, bank in self._banks.items():
            bank.fill(_POISON if size else 0)
        for slot, array in zip(self._slots, self.arrays, strict=True):
            if slot.kind == "special":
                if slot.name not in special:
                    raise Refused(f"register not known: {slot.name}")
                array[:] = special[slot.name]
