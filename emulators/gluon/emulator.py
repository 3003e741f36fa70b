"""Runs the source of Gluon kernels on a CPU: the functions under ``jit``, with the language's
names bound to what is below. Triton's interpreter does not know Gluon.

``values.py`` has its values, and ``machine.py`` runs loads, products and partitions.
``Kernel(function, Timing(...))`` is launched as the compiled kernel would be.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from gluon.machine import Barrier, Load, Machine, Product, Timing, run, running
from gluon.values import TORCH, Descriptor, Pointer, Shared, Value, combined


class Mbarrier:
    MBarrierLayout = staticmethod(lambda: None)

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.init(count)

    @staticmethod
    def expect(barrier: Barrier, size: int) -> None:
        barrier.expect(size)

    @staticmethod
    def arrive(barrier: Barrier, count: int = 1) -> None:
        barrier.arrive(count)
        # whom it lets go on may do so at once
        running().wait(lambda: True, "its turn")

    @staticmethod
    def wait(barrier: Barrier, phase: int) -> None:
        running().wait(lambda: barrier.passed(phase), f"parity {phase} of {barrier}")


def async_load(descriptor: Descriptor, start: list[int], barrier: Barrier, target: Shared) -> None:
    tile = descriptor.tile(start)
    assert target.shape == list(tile.shape) and target.dtype == descriptor.dtype
    assert target.layout == descriptor.layout
    running().load(Load(target.data, tile, barrier))


def warpgroup_mma(
    a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False
) -> Any:
    """a @ b + acc in fp32; a in registers lies as the accumulator wants it."""
    (m, k), (_, n), layout = a.shape, b.shape, acc.layout
    assert b.shape[0] == k and acc.shape == [m, n] and m % 64 == 0, (a.shape, b.shape, acc.shape)
    assert layout.version == [3, 0] and layout.warps_per_cta == [4, 1]
    assert n % layout.instr_shape[1] == 0 and k % layout.instr_shape[2] == 0
    assert a.data.dtype == b.data.dtype
    operands = [b.data]
    if isinstance(a, Shared):
        operands.append(a.data)
    else:
        assert a.layout == gl.DotOperandLayout(0, layout, 2), a.layout
    before = acc.data if isinstance(acc, Value) else None

    def take() -> Tensor:
        product = a.data.float() @ b.data.float()
        if not use_acc:
            return product
        return product + (acc.result if before is None else before)

    product = running().multiply(Product(take, operands, [m, n], layout))
    return product if is_async else warpgroup_mma_wait(0, deps=[product])


def warpgroup_mma_wait(left: int, deps: Any) -> Any:
    running().wait_for_products(left)
    done = [
        x if x in running().current.products or isinstance(x, Value) else Value(x.result, x.layout)
        for x in deps
    ]
    return done[0] if len(done) == 1 else tuple(done)


class Language:
    """``gl``, and what of ``tl`` is used by functions that both share."""

    dtype = gl.dtype
    float32, bfloat16, float16 = gl.float32, gl.bfloat16, gl.float16
    int32, int64 = gl.int32, gl.int64
    BlockedLayout, SliceLayout, DotOperandLayout = (
        gl.BlockedLayout,
        gl.SliceLayout,
        gl.DotOperandLayout,
    )
    NVMMADistributedLayout, SwizzledSharedLayout = (
        gl.NVMMADistributedLayout,
        gl.SwizzledSharedLayout,
    )
    static_range = range

    @staticmethod
    def program_id(axis: int) -> int:
        assert axis == 0
        return running().program_id

    @staticmethod
    def num_programs(axis: int) -> int:
        assert axis == 0
        return running().num_programs

    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return int((a + b - 1) / b)  # towards 0

    @staticmethod
    def cast(x: int, dtype: Any) -> int:
        return x

    @staticmethod
    def arange(start: int, stop: int, layout: Any) -> Value:
        return Value(torch.arange(start, stop, dtype=torch.int32), layout)

    @staticmethod
    def full(shape: list[int], value: float, dtype: Any, layout: Any) -> Value:
        return Value(torch.full(shape, value, dtype=TORCH[dtype]), layout)

    @staticmethod
    def zeros(shape: list[int], dtype: Any, layout: Any) -> Value:
        return Language.full(shape, 0, dtype, layout)

    @staticmethod
    def maximum(a: Any, b: Any) -> Any:
        return combined(torch.maximum, a, b) if isinstance(a, Value) else max(a, b)

    @staticmethod
    def minimum(a: int, b: int) -> int:
        return min(a, b)

    @staticmethod
    def where(condition: Value, a: Any, b: Any) -> Value:
        return combined(torch.where, condition, a, b)

    @staticmethod
    def exp2(x: Value) -> Value:
        return combined(torch.exp2, x)

    @staticmethod
    def log2(x: Value) -> Value:
        return combined(torch.log2, x)

    @staticmethod
    def max(x: Value, dim: int) -> Any:
        return _reduced(x, dim, torch.amax)

    @staticmethod
    def min(x: Value, dim: int) -> Any:
        return _reduced(x, dim, torch.amin)

    @staticmethod
    def sum(x: Value, dim: int) -> Any:
        return _reduced(x, dim, torch.sum)

    @staticmethod
    def convert_layout(x: Value, layout: Any) -> Value:
        return Value(x.data, layout)

    @staticmethod
    def load(pointer: Pointer, mask: Any = None, other: Any = None) -> Any:
        if isinstance(pointer.offset, int):
            assert 0 <= pointer.offset < pointer.memory.numel()
            return pointer.memory[pointer.offset].item()
        places, inside = _places(pointer, mask)
        # what is not loaded is not defined
        undefined = -(2**31) + 1 if other is None else other
        data = torch.full_like(places, undefined, dtype=pointer.memory.dtype)
        data[inside] = pointer.memory[places[inside]]
        return Value(data, pointer.offset.layout)

    @staticmethod
    def store(pointer: Pointer, value: Value, mask: Any = None) -> None:
        places, inside = _places(pointer, mask)
        assert value.layout == pointer.offset.layout
        assert value.data.dtype == pointer.memory.dtype
        pointer.memory[places[inside]] = value.data[inside]

    @staticmethod
    def inline_asm_elementwise(asm: str, constraints: str, args: list[Any], **options: Any) -> Any:
        assert asm == "mov.b32 $0, $1;"
        return args[0]

    @staticmethod
    def allocate_shared_memory(dtype: Any, shape: list[int], layout: Any) -> Shared:
        if dtype == gl.int64:
            return Shared([Barrier() for _ in range(shape[0])], dtype, layout)
        poison = torch.nan if dtype.is_floating() else -(2**31) + 1
        return Shared(torch.full(shape, poison, dtype=TORCH[dtype]), dtype, layout)

    @staticmethod
    def warp_specialize(functions: list[Any], warps: list[int], registers: list[int]) -> None:
        assert len(functions) == 1 + len(warps) == 1 + len(registers)
        for _, arguments in functions[1:]:
            assert not any(isinstance(x, Value) for x in _leaves(arguments))
        running().specialize([lambda f=f, args=args: f(*args) for f, args in functions])


def _leaves(x: Any) -> Iterator[Any]:
    if isinstance(x, tuple):
        for part in x:
            yield from _leaves(part)
    else:
        yield x


def _places(pointer: Pointer, mask: Value | None) -> tuple[Tensor, Tensor]:
    """Offsets, and which of them are inside; these must lie in the tensor's memory."""
    places = pointer.offset.data
    inside = torch.ones_like(places, dtype=torch.bool)
    if mask is not None:
        assert mask.layout == pointer.offset.layout
        inside = mask.data.expand(places.shape)
    used = places[inside]
    if used.numel():
        assert used.min() >= 0 and used.max() < pointer.memory.numel(), "outside of the tensor"
    return places, inside


def _reduced(x: Value, dim: int, function: Callable[..., Tensor]) -> Any:
    data = function(x.data, dim)
    return Value(data, gl.SliceLayout(dim, x.layout)) if data.ndim else data.item()


_FUNCTIONS = {
    "async_load": async_load,
    "async_copy_global_to_shared": async_load,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
}
_built: dict[int, Callable[..., Any]] = {}


def built(function: JITFunction) -> Callable[..., Any]:
    """The function's own code, in the emulator's language."""
    if id(function) not in _built:
        source = function.fn
        names = source.__code__.co_names
        known = {name: source.__globals__[name] for name in names if name in source.__globals__}
        world = {name: _emulated(value) for name, value in known.items()}
        code = types.FunctionType(source.__code__, world, source.__name__, source.__defaults__)
        code.__kwdefaults__ = source.__kwdefaults__
        _built[id(function)] = code
    return _built[id(function)]


def _emulated(value: Any) -> Any:
    if value is gl or value is tl:
        return Language
    if isinstance(value, types.ModuleType) and value.__name__.endswith(".mbarrier"):
        return Mbarrier
    if isinstance(value, JITFunction):
        return built(value)
    if isinstance(value, gl.constexpr):
        return value.value
    return _FUNCTIONS.get(getattr(value, "__name__", ""), value)


class Kernel:
    """Stands in for a kernel: ``kernel[grid](...)`` runs its programs one by one."""

    def __init__(self, function: JITFunction, timing: Timing) -> None:
        self._function, self._timing = function, timing

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            del constants["enable_fp_fusion"]
            given = [_argument(x) for x in args]
            for program in range(grid[0]):
                machine = Machine(self._timing, program, grid[0])
                run(machine, lambda: built(self._function)(*given, **constants))

        return launch


def _argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pointer.to_tensor(x)
    if isinstance(x, TensorDescriptor):
        return Descriptor(x)
    if isinstance(x, tuple):
        parts = [_argument(part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x
