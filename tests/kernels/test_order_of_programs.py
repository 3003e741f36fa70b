"""Which tile a program takes: each once, the longest first over heads that fit a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pool import Pool

from usp import kernels
from usp.kernels import arguments
from usp.planning.visit import transposed

LENGTH, HEADS, KEY_HEADS = 300, 4, 2


def places(num_tiles: int, sequences: int, *rest: Any) -> list[tuple[int, int]]:
    """On a worker: tile and sequence of each program, in the order in which they start."""
    import triton
    import triton.language as tl

    from usp.kernels.tiles import program

    def kernel(
        found,  # type: ignore[no-untyped-def]
        num_tiles,
        together,
        NUM_XCDS: tl.constexpr,
        KEYS: tl.constexpr,
    ) -> None:
        tile, sequence = program(num_tiles, together, NUM_XCDS, KEYS)
        tl.store(found + 2 * tl.program_id(0), tile)
        tl.store(found + 2 * tl.program_id(0) + 1, sequence)

    kernel.__globals__.update(tl=tl, program=program)
    found = torch.full((num_tiles * sequences, 2), -1, dtype=torch.int32)
    triton.jit(kernel)[(len(found),)](found, num_tiles, *rest)
    return [tuple(place) for place in found.tolist()]


@given(st.data())
@settings(max_examples=25)
def test_each_tile_is_taken_once_and_the_longest_first(
    interpreter: Pool, data: st.DataObject
) -> None:
    num_tiles, sequences = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 11))
    together = data.draw(st.none() | st.integers(1, sequences + 2))
    xcds, keys = data.draw(st.sampled_from([1, 8])), data.draw(st.booleans())
    (got,) = interpreter.run(places, num_tiles, sequences, together, xcds, keys, ranks=1)
    tiles = range(num_tiles) if keys else range(num_tiles - 1, -1, -1)
    step = together or 1
    want = [
        (tile, sequence)
        for first in range(0, sequences, step)
        for tile in tiles
        for sequence in range(first, min(first + step, sequences))
    ]
    # programs are dealt out to the chiplets in turn: each has a run of the order
    assert [place for xcd in range(xcds) for place in got[xcd::xcds]] == want


def first_written(
    launch: ModuleType,
    configs: dict[str, Any],
    head_dim: int,
    dtype: torch.dtype,
    only: Callable[[int], AbstractContextManager[None]],
) -> dict[str, list[list[int]]]:
    """Of each result, for each head, the rows that the first programs write, one for each head."""
    q, dout, dq = (torch.randn(1, LENGTH, HEADS, head_dim).to(dtype) for _ in range(3))
    k, v, dk = (torch.randn(1, LENGTH, KEY_HEADS, head_dim).to(dtype) for _ in range(3))
    stop = torch.arange(1, LENGTH + 1, dtype=torch.int32)
    first = torch.zeros_like(stop)
    options = arguments.KernelOptions(
        first, stop, None, None, None, None, 0, HEADS, HEADS // KEY_HEADS, 0.3, 0.0, 0.0, 0
    )
    lse, out = torch.zeros(1, HEADS, LENGTH), torch.zeros_like(q, dtype=torch.float32)
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    given = arguments.BackwardInputs(dout, q, k, v, lse, lse)
    seen_by = arguments.KernelSpan(*transposed(first, stop, LENGTH))
    with mock.patch.object(arguments, "_cached_bytes", lambda device: 2**20):
        with only(KEY_HEADS):
            launch.add_key_gradients(configs["backward_keys"], given, options, seen_by, dk, dv)
        with only(HEADS):
            launch.add_query_gradients(configs["backward_queries"], given, options, dq)
        with only(HEADS):
            lse -= torch.inf
            launch.attention_forward(configs["forward"], q, k, v, options, None, lse, out)
    results = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    return {
        name: [x[0, :, h].any(1).nonzero()[:, 0].tolist() for h in range(x.shape[2])]
        for name, x in results.items()
    }


def portable_ones() -> dict[str, list[list[int]]]:
    """On a worker with Triton's interpreter."""
    from triton.runtime import interpreter

    from usp.kernels.configs import INTERPRETED
    from usp.kernels.portable import launch

    @contextmanager
    def only(most: int) -> Iterator[None]:
        set_index = interpreter.interpreter_builder.set_grid_idx

        def up_to(x: int, y: int, z: int) -> None:
            if x == most:
                raise StopIteration
            set_index(x, y, z)

        with (
            mock.patch.object(interpreter.interpreter_builder, "set_grid_idx", up_to),
            pytest.raises(interpreter.InterpreterError, match="StopIteration"),
        ):
            yield

    names = ("forward", "backward_keys", "backward_queries")
    return first_written(launch, dict.fromkeys(names, INTERPRETED), 16, torch.float32, only)


def hopper_ones() -> dict[str, list[list[int]]]:
    from gluon import emulator
    from hopper_case import SMALL_STEPS, TIMINGS, emulated

    from usp.kernels.hopper import launch

    @contextmanager
    def only(most: int) -> Iterator[None]:
        machine = emulator.Machine

        def up_to(timing: Any, program: int, programs: int) -> Any:
            if program == most:
                raise StopIteration
            return machine(timing, program, programs)

        with mock.patch.object(emulator, "Machine", up_to), pytest.raises(StopIteration):
            yield

    with emulated(TIMINGS[0]):
        return first_written(launch, dict(SMALL_STEPS), 64, torch.bfloat16, only)


def assert_longest_first(found: dict[str, list[list[int]]]) -> None:
    for name, heads in found.items():
        tile = len(heads[0])
        assert 0 < tile < LENGTH, name
        at_end = name in ("out", "dq")
        # of queries the last ones see most, of keys the first ones are seen by most
        want = range(LENGTH - tile, LENGTH) if at_end else range(tile)
        assert heads == [list(want)] * len(heads), name


def test_launches_begin_with_the_longest_tiles(interpreter: Pool) -> None:
    (found,) = interpreter.run(portable_ones, ranks=1)
    assert_longest_first(found)


@pytest.mark.skipif(not kernels.has_gluon(), reason="no Triton with Gluon for Hopper")
def test_launches_on_hopper_begin_with_the_longest_tiles() -> None:
    assert_longest_first(hopper_ones())


def test_what_programs_walk_over_fits_the_cache() -> None:
    """Sequences beside each other, of both sides: see ``csrc/gpu/blocks.h`` for the same."""
    q, k = torch.zeros(2, 64, 12, 16), torch.zeros(2, 32, 3, 16)
    span = torch.zeros(64, dtype=torch.int32)
    options = arguments.KernelOptions(
        span, span, None, None, None, None, 0, 12, 4, 1.0, 0.0, 0.0, 0
    )
    row = 2 * 16 * 4
    for fits, of_queries, of_keys in ((0, 4, 1), (2, 8, 1), (3, 12, 1), (16, 24, 2), (99, 24, 6)):
        with mock.patch.object(arguments, "_cached_bytes", lambda device, n=fits: n * 32 * row):
            assert options.sizes(q, k, k).together == of_queries
            assert options.key_sizes(q, q, k).together == of_keys
