"""Values, pointers, shared memory and descriptors of the Gluon emulator.

They know their layouts and refuse what the compiler would. Pointers are checked against the memory
they point into.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._layouts import DistributedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gluon.machine import Product, running

TORCH = {
    gl.float32: torch.float32,
    gl.bfloat16: torch.bfloat16,
    gl.float16: torch.float16,
    gl.int32: torch.int32,
    gl.int64: torch.int64,
}
GLUON = {torch_dtype: dtype for dtype, torch_dtype in TORCH.items()}


@dataclass(frozen=True)
class Reshaped(DistributedLayout):
    """Where a reshaped tensor's elements lie: where they were."""

    of: Any
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)


class Value:
    """A distributed tensor."""

    def __init__(self, data: Tensor, layout: Any) -> None:
        self.data, self.layout = data, layout
        assert layout.rank == data.ndim, f"{layout} for {data.ndim} dims"

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def type(self) -> Any:
        return types.SimpleNamespace(layout=self.layout)

    def to(self, dtype: Any) -> Value:
        return Value(self.data.to(TORCH[dtype]), self.layout)

    def reshape(self, shape: list[int]) -> Value:
        return Value(self.data.reshape(shape), Reshaped(self.layout, tuple(shape)))

    def __getitem__(self, index: Any) -> Value:
        dim = next(i for i, part in enumerate(index) if part is None)
        assert isinstance(self.layout, gl.SliceLayout) and self.layout.dim == dim, self.layout
        return Value(self.data[index], self.layout.parent)

    def __neg__(self) -> Value:
        return Value(-self.data, self.layout)


def combined(function: Callable[..., Tensor], *operands: Any) -> Value:
    """Elementwise on values of one layout, and scalars."""
    values = [x for x in operands if isinstance(x, (Value, Product))]
    layout = values[0].layout
    assert all(x.layout == layout for x in values), [x.layout for x in values]
    data = function(*(x.data if isinstance(x, (Value, Product)) else x for x in operands))
    # a Python number is fp32 here
    return Value(data.float() if data.dtype == torch.float64 else data, layout)


def _operator(name: str) -> None:
    function = getattr(operator, name)

    def forward(self: Value, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        return combined(function, self, other)

    def swapped(self: Value, other: Any) -> Value:
        return combined(lambda a, b: function(b, a), self, other)

    bare = name.strip("_")
    setattr(Value, f"__{bare}__", forward)
    setattr(Value, f"__r{bare}__", swapped)


for _name in ("add", "sub", "mul", "truediv", "and_", "or_", "lt", "le", "gt", "ge", "eq"):
    _operator(_name)


class Pointer:
    """One or many places in a tensor's memory."""

    def __init__(self, memory: Tensor, offset: Any) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = types.SimpleNamespace(element_ty=GLUON[memory.dtype])

    @classmethod
    def to_tensor(cls, x: Tensor) -> Pointer:
        memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        return cls(memory, x.storage_offset())

    def __add__(self, places: Any) -> Pointer:
        offset = self.offset
        if isinstance(places, Value):
            places = Value(places.data.long(), places.layout)
        return Pointer(self.memory, offset + places)

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.memory, self.offset[index])


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data: Any, dtype: Any, layout: Any) -> None:
        self.data, self.dtype, self.layout = data, dtype, layout

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def index(self, index: int) -> Any:
        if isinstance(self.data, list):
            return self.data[index]
        assert 0 <= index < self.data.shape[0]
        return Shared(self.data[index], self.dtype, self.layout)

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.data.view(shape), self.dtype, self.layout)

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.data.permute(order), self.dtype, self.layout)

    def load(self, layout: Any) -> Value:
        running().about_to_read(self.data)
        return Value(self.data.clone(), layout)

    def store(self, value: Value) -> None:
        assert self.data.shape == value.data.shape and self.data.dtype == value.data.dtype
        running().about_to_write(self.data)
        self.data.copy_(value.data)


class Descriptor:
    """What TMA loads tiles by; zeros outside of the tensor."""

    def __init__(self, of: TensorDescriptor) -> None:
        self.dtype, self.layout = GLUON[of.base.dtype], of.layout
        size = of.base.element_size() * torch.Size(of.block_shape).numel()
        self.block_type = types.SimpleNamespace(shape=of.block_shape, nbytes=size)
        self._tensor = of.base.as_strided(of.shape, of.strides)

    def tile(self, start: list[int]) -> Tensor:
        tile = torch.zeros(self.block_type.shape, dtype=self._tensor.dtype)
        limits = zip(start, self.block_type.shape, self._tensor.shape, strict=True)
        sizes = [max(0, min(block, size - at)) for at, block, size in limits]
        assert min(start) >= 0
        inside = self._tensor[tuple(slice(at, at + n) for at, n in zip(start, sizes, strict=True))]
        tile[tuple(slice(n) for n in sizes)] = inside
        return tile
