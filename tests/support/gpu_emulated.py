"""The GPU kernels' sources, compiled for the CPU, as if they were the compiled ops."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_double, c_int, c_int64, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import torch
from gpu_launches import Launches
from places import CSRC
from torch import Tensor

SOURCES = (
    "gpu/attention_forward.cu",
    "gpu/attention_backward.cu",
    "gpu/bias_backward.cu",
    "gpu/emulated/simt.cpp",
    "gpu/emulated/interface.cpp",
)
# from `first` to `dropout_seed`
NUM_OPTIONS = 13


class _Tensor(Structure):
    _fields_ = [("data", c_void_p), ("strides", c_int64 * 3)]


class _Bias(Structure):
    _fields_ = [("data", c_void_p), ("strides", c_int64 * 4)]


class _Inputs(Structure):
    _fields_ = [
        *[(size, c_int64) for size in ("B", "Lq", "Lk", "H", "G", "D", "Dv", "is_bfloat16")],
        *[(name, _Tensor) for name in "qkv"],
        ("first", c_void_p),
        ("stop", c_void_p),
        ("bias", _Bias),
        ("alibi_slopes", c_void_p),
        ("alibi_strides", c_int64 * 2),
        ("q_pos", c_void_p),
        ("k_pos", c_void_p),
        *[(name, c_int64) for name in ("head_offset", "num_heads", "group_size")],
        *[(name, c_double) for name in ("softmax_scale", "softcap", "dropout_p")],
        ("dropout_seed", c_int64),
    ]


class _Gradients(Structure):
    _fields_ = [
        ("dout", _Tensor),
        *[(name, c_void_p) for name in ("delta", "lse", "dq", "dk", "dv")],
        ("dbias", _Bias),
        *[(name, c_int64) for name in ("overwrite", "dq_is_float", "kv_is_float")],
    ]


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _view(x: Tensor) -> _Tensor:
    assert x.shape[3] <= 1 or x.stride(3) == 1
    return _Tensor(x.data_ptr(), (c_int64 * 3)(x.stride(0), x.stride(1), x.stride(2)))


def _broadcast_strides(x: Tensor, dims: int) -> list[int]:
    return [0 if x.shape[d] == 1 else x.stride(d) for d in range(dims)]


def _bias_view(x: Tensor | None) -> _Bias:
    if x is None:
        return _Bias(None, (c_int64 * 4)())
    return _Bias(x.data_ptr(), (c_int64 * 4)(*_broadcast_strides(x, 3), x.stride(3)))


def _inputs(q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...]) -> _Inputs:
    first, stop, bias, alibi_slopes, q_pos, k_pos, *scalars = options
    alibi_strides = (c_int64 * 2)()
    if alibi_slopes is not None:
        alibi_strides[:] = [_broadcast_strides(alibi_slopes, 1)[0], alibi_slopes.stride(1)]
    return _Inputs(
        *(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]),
        int(q.dtype == torch.bfloat16),
        *map(_view, (q, k, v)),
        *(_pointer(first), _pointer(stop), _bias_view(bias)),
        *(_pointer(alibi_slopes), alibi_strides, _pointer(q_pos), _pointer(k_pos)),
        *scalars,
    )


class BlockOrder(Structure):
    """csrc/gpu/blocks.h: the blocks of a launch."""

    _fields_ = [
        *[(name, c_uint32) for name in ("tiles", "heads", "together", "sequences")],
        *[(name, c_uint32) for name in ("first_batch", "first_head")],
    ]


class GpuEmulatedOps:
    """Has the ops' own arguments, as in docs/contract.md; tensors are bf16 or fp16, on the CPU."""

    def __init__(self, wave_size: int, folder: Path, *flags: str) -> None:
        built = _build(wave_size, folder, flags)
        self._library = ctypes.CDLL(str(built))
        self.redirected = Launches(self._library, built).redirected
        self._library.usp_gpu_attention_forward.argtypes = [POINTER(_Inputs), *[c_void_p] * 3]
        self._library.usp_gpu_attention_backward.argtypes = [POINTER(_Inputs), POINTER(_Gradients)]
        assert self._library.usp_gpu_wave_size() == wave_size
        self.wave_size = wave_size

    def descending_waves(self, descending: bool) -> None:
        self._library.usp_gpu_descending_waves(int(descending))

    @contextmanager
    def first_blocks(self, most: int) -> Iterator[None]:
        """In here a launch ends after so many blocks."""
        self._library.usp_gpu_block_limit(c_uint32(most))
        try:
            yield
        finally:
            self._library.usp_gpu_block_limit(c_uint32(2**32 - 1))

    def layout(self, name: str, lane: int, element: int) -> tuple[int, int]:
        row, column = c_int(), c_int()
        found = self._library.usp_gpu_layout(
            name.encode(), lane, element, byref(row), byref(column)
        )
        assert found, name
        return row.value, column.value

    def place(self, order: BlockOrder, index: int) -> tuple[int, int, int]:
        """Batch entry, head and tile of a block."""
        b, h, tile = c_int(), c_int(), c_int()
        self._library.usp_gpu_place(byref(order), c_uint32(index), byref(b), byref(h), byref(tile))
        return b.value, h.value, tile.value

    def attention_forward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
        options, state = rest[:NUM_OPTIONS], rest[NUM_OPTIONS:]
        inputs = _inputs(q, k, v, options)
        out, lse, result = state if len(state) == 3 else (*state, None)
        self._library.usp_gpu_attention_forward(byref(inputs), *map(_pointer, (out, lse, result)))

    def attention_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lse: Tensor, *rest: Any
    ) -> None:
        dq, dk, dv, dbias, *overwrite = rest[NUM_OPTIONS:]
        inputs = _inputs(q, k, v, rest[:NUM_OPTIONS])
        pointers = [x.data_ptr() for x in (delta, lse, dq, dk, dv)]
        kept = (any(overwrite), dq.dtype == torch.float32, dk.dtype == torch.float32)
        assert dk.dtype == dv.dtype and (kept[0] or kept[1:] == (True, True))
        gradients = _Gradients(_view(dout), *pointers, _bias_view(dbias), *map(int, kept))
        self._library.usp_gpu_attention_backward(byref(inputs), byref(gradients))


@functools.cache
def emulated_ops(wave_size: int) -> GpuEmulatedOps:
    """Built once in a process; the loaded library outlives its file."""
    with tempfile.TemporaryDirectory() as folder:
        return GpuEmulatedOps(wave_size, Path(folder))


def _build(wave_size: int, folder: Path, flags: tuple[str, ...]) -> Path:
    """Each source on its own, then one shared library."""
    language = ("-std=c++20", "-O1", "-fPIC", "-Wno-psabi", f"-I{CSRC}")
    common = ["g++", *language, f"-DUSP_GPU_EMULATED_WAVE={wave_size}", *flags]
    objects = [folder / f"{Path(source).name}.{wave_size}.o" for source in SOURCES]
    compilers = [
        subprocess.Popen([*common, "-x", "c++", "-c", str(CSRC / source), "-o", str(compiled)])
        for source, compiled in zip(SOURCES, objects, strict=True)
    ]
    statuses = [compiler.wait() for compiler in compilers]
    assert not any(statuses)
    library = folder / f"usp_gpu_emulated_{wave_size}.so"
    subprocess.run([*common, "-shared", "-o", str(library), *map(str, objects)], check=True)
    return library
