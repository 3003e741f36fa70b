"""A mask as what a graph can hold: words, numbers, and the tensors of tables.

The words are the mask written down from outside in, each class with its fields behind it:
``causal() & first_keys(4)`` is "Intersection tuple2 Interval none int FirstKeys int" with the
numbers 0 and 4. So a graph is made for one form of a mask, and its numbers may be other ones where
it runs. It reads nothing but plain attributes, which ``torch.compile`` watches by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from usp.planning.masks.bands import Bands
from usp.planning.masks.dense import Table
from usp.planning.masks.mask import (
    Complement,
    Everything,
    Intersection,
    Mask,
    Nothing,
    Shifted,
    Union,
)
from usp.planning.masks.neighbourhood import EDGES, Neighbourhood
from usp.planning.masks.terms import Blocks, Documents, FirstKeys, FirstQueries, Interval

_KINDS: tuple[type[Any], ...] = (
    Everything,
    Nothing,
    Intersection,
    Union,
    Complement,
    Shifted,
    Interval,
    Documents,
    Blocks,
    FirstKeys,
    FirstQueries,
    Neighbourhood,
    Table,
    Bands,
)
_BY_NAME = {kind.__name__: kind for kind in _KINDS}
_CONSTANTS: dict[str, Any] = {"none": None, "yes": True, "no": False} | {x: x for x in EDGES}


class Told(NamedTuple):
    """What is told of masks.

    Attributes:
        words: What they are made of.
        numbers: Those of its words "int" and "ints", in their order.
        tensors: Those of its words "tensor", int64 on CPU; their sizes are among the numbers.
    """

    words: list[str]
    numbers: list[int]
    tensors: list[Tensor]


def told(mask: Mask | Sequence[Mask]) -> Told:
    """A mask, or several, as words, numbers and tensors.

    Raises:
        NotImplementedError: a mask is of a class that is none of ours.
    """
    into = Told([], [], [])
    _tell(tuple(mask) if isinstance(mask, (list, tuple)) else mask, into)
    return into


def from_told(words: str, numbers: Sequence[int], tensor: Tensor | None) -> Any:
    """The way back: an equal mask, or a tuple of them.

    Args:
        words: With a blank between.
        numbers: As told.
        tensor: The elements of all tensors, one behind the other; copied, as it may be a graph's.
    """
    rest = torch.empty(0, dtype=torch.int64, device="cpu") if tensor is None else tensor.clone()
    return _Telling(iter(words.split()), iter(numbers), rest).value()


def _tell(value: Any, into: Told) -> None:
    words, numbers, tensors = into
    if isinstance(value, Tensor):
        words.append(f"tensor{value.dim()}")
        numbers.extend(value.shape)
        tensors.append(value)
    elif type(value) in _KINDS:
        words.append(type(value).__name__)
        for name in type(value).__match_args__:
            _tell(getattr(value, name), into)
    elif isinstance(value, Mask):
        raise NotImplementedError(
            f"{type(value).__name__} is no mask that usp.masks makes, and neither a graph nor a "
            "dispatch mode can hold it: make it with from_function or from_dense"
        )
    elif value is None or isinstance(value, bool):
        words.append({None: "none", True: "yes", False: "no"}[value])
    elif isinstance(value, str):
        words.append(value)
    elif isinstance(value, tuple):
        if all(type(each) is int for each in value):
            words.append("ints")
            numbers.append(len(value))
            numbers.extend(value)
        else:
            words.append(f"tuple{len(value)}")
            for each in value:
                _tell(each, into)
    else:
        words.append("int")
        numbers.append(value)


class _Telling:
    """What is still to be read."""

    def __init__(self, words: Iterator[str], numbers: Iterator[int], rest: Tensor) -> None:
        self._words, self._numbers, self._rest = words, numbers, rest

    def value(self) -> Any:
        word = next(self._words)
        if word in _CONSTANTS:
            return _CONSTANTS[word]
        if word == "int":
            return self._number()
        if word == "ints":
            return tuple(self._number() for _ in range(self._number()))
        if word.startswith("tuple"):
            return tuple(self.value() for _ in range(int(word.removeprefix("tuple"))))
        if word.startswith("tensor"):
            shape = torch.Size(self._number() for _ in range(int(word.removeprefix("tensor"))))
            part, self._rest = self._rest.tensor_split([shape.numel()])
            return part.view(shape)
        kind = _BY_NAME[word]
        return kind(*(self.value() for _ in kind.__match_args__))

    def _number(self) -> int:
        return int(next(self._numbers))
