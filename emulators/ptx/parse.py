"""PTX text as data: entries, their parameters, registers and instructions.

Source: PTX ISA, "Syntax" and "Instructions": a statement is a directive, a label, or
``@p opcode d, a, b;``; braces open a scope with registers and labels of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from .operands import (
    Address,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Pair,
    Refused,
    Register,
    Sink,
    Symbol,
    Vector,
)


@dataclass(frozen=True)
class Variable:
    """In parameter or shared memory; ``size`` None is what the launch makes it."""

    name: str
    size: int | None
    align: int


@dataclass
class Body:
    """Of an entry. Names are unique: those of an inner scope have its number behind them."""

    registers: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    shared: list[Variable] = field(default_factory=list)
    tables: dict[int, list[str]] = field(default_factory=dict)  # labels to jump to, by place


_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_VARIABLE = re.compile(
    r"\.(?P<space>param|shared)\s+(?P<rest>(?:\.\w+\s+(?:\d+\s+)?)*?)"
    r"\.[bsuf](?P<bits>8|16|32|64)\s+(?P<attributes>(?:\.ptr|\.global|\.align \d+|\s)*)"
    r"(?P<name>[\w$]+)\s*(?P<array>\[\d*\])?"
)
_ENTRY = re.compile(r"(?m)^[ \t]*(?:\.visible\s+|\.weak\s+)?\.entry\s+([\w$]+)\s*\(")
_STATEMENT = re.compile(
    r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[\w$]+):|(?P<text>[^;{}]*(?:\{[^}]*\}[^;{}]*)*);)"
)
# A directive of debugging ends with its line.
_NOISE = re.compile(r"//[^\n]*|/\*.*?\*/|^[ \t]*\.(?:loc|file)\b[^\n]*", re.DOTALL | re.MULTILINE)


def _variables(text: str, space: str) -> list[Variable]:
    found = []
    for match in _VARIABLE.finditer(text):
        if match["space"] != space:
            continue
        unit, array = _SIZES[match["bits"]], match["array"]
        align = re.search(r"\.align (\d+)", match["rest"])
        size = unit if array is None else None if array == "[]" else unit * int(array[1:-1])
        found.append(Variable(match["name"], size, int(align[1]) if align else unit))
    return found


@dataclass(frozen=True)
class Entry:
    """One kernel of a module; its body is read when it is first wanted.

    Attributes:
        text: What stands behind its opening brace, in the whole file.
    """

    name: str
    header: str
    text: str
    module_shared: tuple[Variable, ...]

    @property
    def parameters(self) -> list[Variable]:
        return _variables(self.header, "param")

    @property
    def max_threads(self) -> int | None:
        match = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", self.header)
        return int(match[1]) if match else None

    @cached_property
    def body(self) -> Body:
        return _read_body(self.text)

    def edited(self, pattern: str, new: str, count: int = 0) -> Entry:
        """The same kernel with another text, as ``re.sub`` makes it; the pattern must be there."""
        text, times = re.subn(pattern, new, self.text, count=count, flags=re.MULTILINE)
        if not times:
            raise ValueError(f"no {pattern!r} in {self.name}")
        return replace(self, text=text)


def entries(ptx: str) -> dict[str, Entry]:
    """The kernels of a PTX file by their mangled names."""
    starts = list(_ENTRY.finditer(ptx))
    module_shared = tuple(_variables(ptx[: starts[0].start()], "shared")) if starts else ()
    found = {}
    ends = [start.start() for start in starts[1:]] + [len(ptx)]
    for start, end in zip(starts, ends, strict=True):
        opening = ptx.index("\n{", start.end())
        header = _NOISE.sub("", ptx[start.end() : opening])
        found[start[1]] = Entry(start[1], header, ptx[opening + 2 : end], module_shared)
    return found


def _statements(text: str) -> Iterator[tuple[str, str]]:
    """Up to the brace that closes the body."""
    text = _NOISE.sub("", text)
    at, depth = 0, 1
    while True:
        match = _STATEMENT.match(text, at)
        if match is None:
            raise Refused(f"not a statement: {text[at : at + 80]!r}")
        kind = match.lastgroup
        assert kind is not None
        depth += (kind == "open") - (kind == "close")
        if depth == 0:
            return
        yield kind, " ".join(match[kind].split())
        at = match.end()


class _Scopes:
    """What the names mean where the reader is."""

    def __init__(self) -> None:
        self.names: list[dict[str, str]] = [{}]
        self.registers: set[str] = set()
        self.known: dict[str, Operand] = {}  # outside of inner scopes
        self.count = 0

    @property
    def inner(self) -> bool:
        return len(self.names) > 1

    def open(self) -> None:
        self.names.append({})
        self.count += 1

    def close(self) -> None:
        self.names.pop()

    def declare(self, name: str) -> str:
        unique = f"{name}~{self.count}" if self.inner else name
        self.names[-1][name] = unique
        return unique

    def find(self, name: str) -> str:
        for names in reversed(self.names):
            if name in names:
                return names[name]
        return name


def _read_body(text: str) -> Body:
    body, scopes = Body(), _Scopes()
    statements = list(_statements(text))
    for at, (kind, content) in enumerate(statements):
        if kind == "open":
            scopes.open()
            for label in _labels_of_scope(statements[at + 1 :]):
                scopes.declare(label)
        elif kind == "close":
            scopes.close()
        elif kind == "label":
            body.labels[scopes.find(content)] = len(body.code)
        elif content.startswith(".reg"):
            _declare(content, body, scopes)
        elif content.startswith(".shared"):
            body.shared += _variables(content, "shared")
        elif content.startswith(".pragma"):
            continue
        elif content.startswith(".branchtargets"):
            body.tables[len(body.code)] = content.split(None, 1)[1].split(", ")
        elif content.startswith("."):
            raise Refused(f"directive not known: {content}")
        elif content:
            body.code.append(_instruction(content, scopes))
    return body


def _labels_of_scope(rest: list[tuple[str, str]]) -> Iterator[str]:
    depth = 0
    for kind, content in rest:
        depth += (kind == "open") - (kind == "close")
        if depth < 0:
            return
        if kind == "label" and depth == 0:
            yield content


def _declare(content: str, body: Body, scopes: _Scopes) -> None:
    """``.reg .b32 a, %r<5>``"""
    match = re.fullmatch(r"\.reg \.(\w+) (.+)", content)
    if match is None:
        raise Refused(f"registers not known: {content}")
    for name in match[2].split(","):
        many = re.fullmatch(r"\s*([\w$%]+)<(\d+)>\s*", name)
        names = [f"{many[1]}{n}" for n in range(int(many[2]))] if many else [name.strip()]
        for one in names:
            unique = scopes.declare(one)
            scopes.registers.add(unique)
            body.registers[unique] = match[1]


_INSTRUCTION = re.compile(r"(?:@(!?)([\w$%]+) )?([\w.:]+)(?: (.*))?")


def _instruction(content: str, scopes: _Scopes) -> Instruction:
    match = _INSTRUCTION.fullmatch(content)
    if match is None:
        raise Refused(f"not an instruction: {content}")
    guard = (scopes.find(match[2]), match[1] == "!") if match[2] else None
    operands = tuple(_operand(text, scopes) for text in _split(match[4] or ""))
    return Instruction(match[3], operands, guard, content)


_BRACKET = re.compile(r"[\[{]")


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    if not _BRACKET.search(text):
        return text.replace(" ", "").split(",") if text else []
    parts, depth = [""], 0
    for piece in re.split(r"([,\[\]{}])", text):
        depth += (piece in ("[", "{")) - (piece in ("]", "}"))
        if piece == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += piece
    return [part.strip() for part in parts]


_NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?|0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}")


def _operand(text: str, scopes: _Scopes) -> Operand:
    if scopes.inner:
        return _read_operand(text, scopes)
    found = scopes.known.get(text)
    if found is None:
        found = scopes.known[text] = _read_operand(text, scopes)
    return found


def _read_operand(text: str, scopes: _Scopes) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_operand(part, scopes) for part in _split(text[1:-1].strip())))
    if text.startswith("["):
        return _address(text[1:-1].strip(), scopes)
    if text.startswith("!"):
        return Negated(_operand(text[1:].strip(), scopes))
    if "|" in text:
        first, second = text.split("|")
        return Pair(_operand(first.strip(), scopes), _operand(second.strip(), scopes))
    if text == "_":
        return Sink()
    if _NUMBER.fullmatch(text):
        return Immediate(text)
    name = scopes.find(text)
    if name in scopes.registers or name.startswith("%"):
        return Register(name)
    if re.fullmatch(r"[\w$]+", text):
        return Symbol(name)
    raise Refused(f"operand not known: {text!r}")


def _address(text: str, scopes: _Scopes) -> Address:
    base, *coordinates = _split(text)
    match = re.fullmatch(r"([^+]+?)(?:\s*\+\s*(-?\w+))?", base)
    if match is None or not base:
        raise Refused(f"address not known: [{text}]")
    offset = int(match[2], 0) if match[2] else 0
    parts = tuple(_operand(part, scopes) for part in coordinates)
    return Address(_operand(match[1], scopes), offset, parts)
