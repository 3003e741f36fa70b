"""Triton's kernels of linear attention, in its interpreter: walks equal the recurrence."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pool as worker
import pytest
import torch
from guarded import assert_untouched, guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_walks import Walk, assert_walk
from pool import Pool
from torch import Tensor

import usp
from usp.linear_attention import families, triton
from usp.linear_attention.kernels import Traits
from usp.linear_attention.trust import results
from usp.testing import linear_recurrence

# Of half precision, what was computed is rounded before it is multiplied.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
# chunks of the interpreter have 16 tokens, tiles 32 channels
LENGTHS = (1, 15, 16, 17, 37)


def answers(walk: Walk) -> dict[str, Tensor]:
    """On a worker."""
    return results(triton, *walk.inputs())


def judge(walk: Walk, interpreter: Pool) -> None:
    (found,) = interpreter.run(answers, walk, ranks=1)
    assert_walk(walk, found, TOLERANCE, rounds=True)


@settings(max_examples=max(settings.default.max_examples // 8, 1))
@given(
    walk=st.builds(
        Walk,
        batch=st.just(1),
        length=st.sampled_from(LENGTHS),
        heads=st.sampled_from([(1, 1, 1), (1, 1, 3), (3, 1, 1), (2, 1, 2)]),
        dims=st.tuples(st.integers(1, 32), st.integers(1, 32)),
        g=st.sampled_from([None, "blh", "1lh", "1l1", "10h", "101", "blhd", "1l1d"]),
        strength=st.sampled_from([0.01, 1.0, 1000.0, float("inf")]),
        fused=st.booleans(),
        dtype=st.sampled_from(list(TOLERANCE)),
        seed=st.integers(0, 99),
    )
)
def test_walks_equal_the_recurrence(walk: Walk, interpreter: Pool) -> None:
    judge(walk, interpreter)


EDGES = {
    "tiles of channels": Walk(batch=1, length=18, heads=(1, 1, 1), dims=(37, 41), fused=True),
    # of chunks of 32 tokens, in halves of 16
    "channels": Walk(batch=1, length=35, heads=(1, 2, 2), dims=(33, 7), g="blhd", strength=20.0),
    "no tokens": Walk(length=0),
    "no tokens of channels": Walk(length=0, g="blhd"),
    "no samples": Walk(batch=0, length=5),
}


@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge: str, interpreter: Pool) -> None:
    judge(EDGES[edge], interpreter)


def written(walk: Walk) -> list[str]:
    """On a worker: what is written beside results, or is no number, of offsets in 64 bits too."""
    from usp.kernels.linear import launch

    rooms: list[tuple[Tensor, Tensor]] = []

    def room(shape: Any, dtype: torch.dtype) -> Tensor:
        rooms.append(guarded(torch.Size(shape), float("nan"), dtype))
        return rooms[-1][0]

    new_empty = Tensor.new_empty

    def empty(x: Tensor, shape: Any, **options: Any) -> Tensor:
        if "device" in options:  # the interpreter's own
            return new_empty(x, shape, **options)
        return room(shape, options.get("dtype", x.dtype))

    def like(x: Tensor, memory_format: Any = None) -> Tensor:
        return room(x.shape, x.dtype)

    tokens, before, dout, behind = walk.inputs()
    with (
        mock.patch.object(Tensor, "new_empty", empty),
        mock.patch.object(torch, "empty_like", like),
        mock.patch.object(launch, "is_wide", lambda *_: True),
    ):
        _, _, saved = triton.forward(tokens, before, (), True)
        triton.backward(tokens, saved, dout, behind, (), True)
    for inside, around in rooms:
        assert_untouched(around, inside)
    return [str(inside.shape) for inside, _ in rooms if inside.isnan().any()]


@pytest.mark.parametrize("g", ["blh", "blhd"])
def test_nothing_else_is_written(g: str, interpreter: Pool) -> None:
    walk = Walk(batch=1, length=19, heads=(1, 2, 2), dims=(5, 19), dtype=torch.bfloat16, g=g)
    assert interpreter.run(written, walk, ranks=1) == [[]]


def on_a_mesh(decay: str, method: str) -> list[Tensor]:
    """On a worker: this rank's out and gradients, and the last state, by them alone."""
    mesh = worker.mesh(1, 2)
    whole, wanted = sequence(decay)
    leaves = [x if x.dim() == 1 else usp.shard_sequence(x, mesh, 1) for x in whole]
    q, k, v, logs = leaves = [x.clone().requires_grad_() for x in leaves]
    options = {"method": method, "cu_seqlens": (0, 9, TOKENS), "return_state": True}
    with mock.patch.object(families, "FAMILIES", (triton,)):
        out, final = usp.linear_attention(q, k, v, logs, mesh=mesh, **options)
    assert out.grad_fn is not None and out.grad_fn.name() == "_FusedBackward"
    given = [usp.shard_sequence(wanted[0], mesh, 1), wanted[1] / mesh.size]
    return [out.detach(), final.detach(), *torch.autograd.grad([out, final], leaves, given)]


TOKENS = 37


def sequence(decay: str) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and logs of decays, and cotangents of out and the last state."""
    random = torch.Generator().manual_seed(5)
    shapes = [(1, TOKENS, heads, 5) for heads in (1, 2, 2)] + [(1, TOKENS, 2, 5), (1, 2, 5, 5)]
    q, k, v, dout, dfinal = (torch.randn(shape, generator=random) for shape in shapes)
    logs = -torch.rand((2,) if decay == "heads" else (1, TOKENS, 2), generator=random)
    return [q, k, v, logs], [dout, dfinal]


@pytest.mark.parametrize(("decay", "method"), [("heads", "ring"), ("tokens", "gather")])
def test_a_sequence_over_two_ranks(decay: str, method: str, interpreter: Pool) -> None:
    parts = interpreter.run(on_a_mesh, decay, method, ranks=2)
    whole, wanted = sequence(decay)
    leaves = [x.double().requires_grad_() for x in whole]
    right = linear_recurrence(*leaves, cu_seqlens=(0, 9, TOKENS))
    gradients = torch.autograd.grad(right, leaves, [x.double() for x in wanted])
    for place, y in enumerate([*right, *gradients]):
        pieces = [part[place].double() for part in parts]
        if y.dim() == 1:
            x = pieces[0] + pieces[1]
        else:
            x = pieces[0] if place == 1 else torch.cat(pieces, 1)
        torch.testing.assert_close(x, y.detach(), rtol=1e-5, atol=1e-5)


def test_reasons_against() -> None:
    traits = Traits(torch.device("cpu"), torch.float64, (5, 7), "channels", True)
    where, *others = triton.reasons_against(traits)
    assert "Triton" in where or "GPU" in where
    assert others == [
        "its state is fp32, of fp32, bf16 or fp16 and not of torch.float64",
        "it has no delta rule",
    ]
