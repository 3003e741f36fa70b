"""Linear attention in one graph of torch.compile, on one device and on meshes, equals eager."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import compiling
import pool as worker
import pytest
import torch
from pool import RemoteError
from torch import Tensor

import usp
from usp.distributed.comm import Axis
from usp.linear_attention import families, native
from usp.ops import native as ops

pytestmark = pytest.mark.long
LENGTH, HEADS, DIM = 70, 2, 5
CALLS: dict[str, dict[str, Any]] = {
    "tokens": {"decay": (2, LENGTH, HEADS), "method": "ring"},
    "channels": {"decay": (2, LENGTH, HEADS, DIM), "cu_seqlens": (0, 9, 66, LENGTH)},
    "the delta rule": {"decay": (2, LENGTH, HEADS), "beta": (2, LENGTH, HEADS)},
    "states": {"decay": (HEADS,), "beta": (2, LENGTH, HEADS), "return_state": True},
    "states of kernels": {"decay": (HEADS,), "return_state": True},
}
for with_states in ("states", "states of kernels"):
    CALLS[with_states]["initial_state"] = (2, HEADS, DIM, DIM)


def inputs(call: dict[str, Any], mesh: usp.SequenceMesh | None) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    shapes = dict.fromkeys("qkv", (2, LENGTH, HEADS, DIM))
    shapes |= {name: x for name, x in call.items() if name in ("decay", "beta", "initial_state")}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=random, dtype=torch.float64)
        x = -x.abs() if name == "decay" else x.sigmoid() if name == "beta" else x / DIM
        if name != "initial_state" and len(shape) > 1:
            x = usp.shard_sequence(x, mesh, 1)
        found[name] = x.clone().requires_grad_()
    return found


def run(function: Any, leaves: dict[str, Tensor]) -> tuple[list[Tensor], int]:
    """Results and gradients, and the bytes of messages of states."""
    sent: list[int] = []
    gather, exchange = Axis.all_gather, Axis.exchange

    def gathering(axis: Axis, message: Tensor, *others: Any) -> Any:
        sent.append(message.nbytes if message.is_floating_point() else 0)  # else the ranks meet
        return gather(axis, message, *others)

    def exchanging(axis: Axis, send: Any, receive: Any) -> Any:
        sent.extend(message.nbytes for _, message in send)
        return exchange(axis, send, receive)

    for x in leaves.values():
        x.grad = None
    with mock.patch.multiple(Axis, all_gather=gathering, exchange=exchanging):
        out = function(leaves)
        found = out if isinstance(out, tuple) else (out,)
        sum((x * torch.cos(x.detach() + 1)).sum() for x in found).backward()
    return [*(x.detach() for x in found), *(x.grad for x in leaves.values())], sum(sent)


def compared(
    degrees: tuple[int, int] | None, name: str, module: bool, plain: bool = False
) -> tuple[list[str], int]:
    """What differs from eager at the first and the second call, and how many graphs there are.

    Args:
        plain: Whether there are no kernels for it.
    """
    with mock.patch.object(families, "FAMILIES", ()) if plain else nullcontext():
        return of_calls(degrees, name, module)


def of_calls(degrees: tuple[int, int] | None, name: str, module: bool) -> tuple[list[str], int]:
    mesh = None if degrees is None else worker.mesh(*degrees)
    call, wrong = CALLS[name], []
    options = {n: x for n, x in call.items() if n in ("method", "cu_seqlens", "return_state")}
    attention = usp.LinearAttention(mesh, seq_len=LENGTH, **options)

    def attend(leaves: dict[str, Tensor]) -> Any:
        q, k, v, *others = leaves.values()
        more = dict(zip(list(leaves)[3:], others, strict=True))
        if module:
            return attention(q.sin(), k, v, **more)
        given = options | more | {"validate": False}
        return usp.linear_attention(q.sin(), k, v, mesh=mesh, seq_len=LENGTH, **given)

    leaves, compiler = inputs(call, mesh), compiling.Counting("aot_eager")
    wanted, _ = run(attend, leaves)
    wanted, sent = run(attend, leaves)
    with compiling.afresh(), mock.patch.object(native, "backward", wraps=native.backward) as kernel:
        fast = torch.compile(attend, fullgraph=True, backend=compiler)
        for _ in range(2):
            found, bytes_of = run(fast, leaves)
            for n, (a, b) in enumerate(zip(found, wanted, strict=True)):
                if not torch.allclose(a, b, rtol=1e-11, atol=1e-11):
                    wrong.append(f"{n}: {(a - b).abs().max():.1e}")
            if bytes_of != sent:
                wrong.append(f"{bytes_of} bytes, not {sent}")
    taken = native in families.FAMILIES and ops.load_error() is None and "beta" not in call
    if kernel.call_count != (2 if taken else 0):
        wrong.append(f"{kernel.call_count} calls of the kernels")
    return wrong, compiler.graphs


@pytest.mark.parametrize("plain", [False, True])
def test_one_graph_on_one_device(plain: bool) -> None:
    assert compared(None, "channels", False, plain) == ([], 1)


def test_a_graph_that_needs_one_gradient() -> None:
    leaves = inputs(CALLS["channels"], None)
    tensors = [x.detach() for x in leaves.values()]
    k = tensors[1].requires_grad_()
    with compiling.afresh():
        fast = torch.compile(usp.linear_attention, backend="aot_eager", fullgraph=True)
        found, wanted = (
            torch.autograd.grad(f(*tensors).sum(), k)[0] for f in (fast, usp.linear_attention)
        )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "channels"])
def test_one_graph_on_a_mesh(pool, name: str) -> None:
    degrees = (1, 2) if name == "tokens" else (2, 1)
    found = pool.run(compared, degrees, name, name == "the delta rule", ranks=2)
    assert found == [([], 1)] * 2


def disagreeing() -> None:
    mesh = worker.mesh(1, 2)
    x = torch.zeros(1, 4, 1, 2)
    method = ("gather", "ring")[mesh.rank]
    with compiling.afresh():
        torch.compile(usp.linear_attention, backend="aot_eager", fullgraph=True)(
            x, x, x, mesh=mesh, seq_len=8, method=method
        )


def test_graphs_that_differ_are_refused_on_every_rank(pool) -> None:
    for outcome in pool.outcomes(disagreeing, ranks=2):
        assert isinstance(outcome, RemoteError)
        assert "disagree on what is done: rank 0 has ('gather'" in outcome.message
