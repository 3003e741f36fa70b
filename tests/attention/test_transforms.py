"""What is not reverse mode, once: right, or refused alike in eager, compiled and exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pool as worker
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from pool import RemoteError
from torch import Tensor

import usp
from usp.testing import dense_attention

Attend = Callable[[Tensor], Tensor]
WAYS = ["eager", "compiled", "exported"]


def qkvt(*lead: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shape = (*lead, 2, 5, 2, 4)
    return [torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(4)]


Q, K, V, T = qkvt()


class Model(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return usp.long_context_attention(q, k, v, causal=True)


def eager(q: Tensor) -> Tensor:
    return Model()(q, K, V)


@pytest.fixture(scope="module")
def exported() -> Attend:
    module = torch.export.export(Model(), (Q, K, V)).module()
    return lambda q: module(q, K, V)


@pytest.fixture(params=WAYS)
def call(request) -> Callable[[Callable[[Attend], Any]], Any]:
    """Runs a transform of attention, in one of the ways."""
    torch._dynamo.reset()
    if request.param == "eager":
        return lambda transform: transform(eager)
    if request.param == "exported":
        module = request.getfixturevalue("exported")
        return lambda transform: transform(module)
    return lambda transform: torch.compile(lambda: transform(eager), backend="aot_eager")()


def dual(attend: Attend) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(attend(forward_ad.make_dual(Q, T))).tangent


def square(attend: Attend) -> Attend:
    return lambda q: attend(q).square().sum()


FORWARD: dict[str, Callable[[Attend], Any]] = {
    "jvp": lambda attend: torch.func.jvp(attend, (Q,), (T,)),
    "jacfwd": lambda attend: torch.func.jacfwd(attend)(Q),
    "dual numbers": dual,
}
TRANSFORMS: dict[str, Callable[[Attend], Any]] = {
    "grad": lambda attend: torch.func.grad(square(attend))(Q),
    "vjp": lambda attend: torch.func.vjp(attend, Q)[1](T),
    "jacrev": lambda attend: torch.func.jacrev(attend)(Q),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_is_refused(call, name: str) -> None:
    with pytest.raises(Exception, match=r"no forward-mode derivative.*use reverse mode"):
        call(FORWARD[name])


@pytest.mark.parametrize("name", TRANSFORMS)
def test_derivatives_of_torch_func_are_refused(call, name: str) -> None:
    with pytest.raises(Exception, match=r"torch.func.*use backward\(\)"):
        call(TRANSFORMS[name])


def test_what_is_not_differentiated_may_stand_beside(call) -> None:
    """A transform of something else, with attention on the way, is none of our business."""
    got = call(lambda attend: torch.func.jvp(lambda x: attend(Q) * x, (T,), (T,)))
    out = eager(Q)
    torch.testing.assert_close(got, (out * T, out * T), rtol=1e-12, atol=1e-12)


def test_vmap(call) -> None:
    items = torch.stack((Q, T, V), 1)
    got = call(lambda attend: torch.func.vmap(attend, in_dims=1, out_dims=2)(items))
    right = torch.stack([dense_attention(q, K, V, causal=True)[0] for q in items.unbind(1)], 2)
    torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9)


def transformed_by_one(name: str) -> None:
    mesh = worker.mesh(1, 2)
    transform = (FORWARD | TRANSFORMS)[name] if mesh.rank else lambda attend: attend(Q)
    transform(lambda q: usp.long_context_attention(q, K, V, mesh))


@pytest.mark.parametrize("name", ["jvp", "dual numbers", "grad"])
def test_what_one_rank_transforms_is_refused_on_all(pool, name: str) -> None:
    for outcome in pool.outcomes(transformed_by_one, name, ranks=2):
        assert isinstance(outcome, RemoteError) and outcome.kind == "NotImplementedError", outcome


def vmapped(ulysses: int, ring: int) -> list[Tensor]:
    mesh = worker.mesh(ulysses, ring)
    cut = [usp.shard_sequence(x, mesh, 2).requires_grad_() for x in qkvt(3)[:3]]
    dout = usp.shard_sequence(qkvt(3)[3], mesh, 2)
    out = torch.func.vmap(lambda *x: usp.long_context_attention(*x, mesh, seq_len=5))(*cut)
    return [out.detach(), *torch.autograd.grad(out, cut, dout)]


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 2)])
def test_vmap_on_a_mesh_and_its_gradients(pool, mesh: tuple[int, int]) -> None:
    found = pool.run(vmapped, *mesh, ranks=mesh[0] * mesh[1])
    *leaves, dout = qkvt(3)
    flat = [x.flatten(0, 1).requires_grad_() for x in leaves]
    out, _ = dense_attention(*flat)
    right = [out.detach(), *torch.autograd.grad(out, flat, dout.flatten(0, 1))]
    for parts, whole in zip(zip(*found, strict=True), right, strict=True):
        torch.testing.assert_close(torch.cat(parts, 2).flatten(0, 1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("linear", [False, True])
def test_a_second_derivative_is_refused_where_it_is_taken(exported, linear: bool) -> None:
    for attend in (eager, exported):
        q = Q.clone().requires_grad_()
        out = attend(q)
        loss = (out * T).sum() if linear else out.square().sum()
        (dq,) = torch.autograd.grad(loss, q, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(dq.square().sum(), q, allow_unused=True)


def second_on_a_mesh() -> str:
    mesh = worker.mesh(2, 1)
    q, k, v, t = (usp.shard_sequence(x, mesh, 1) for x in qkvt())
    q.requires_grad_()
    out = usp.long_context_attention(q, k, v, mesh, seq_len=5)
    (dq,) = torch.autograd.grad((out * t).sum(), q, create_graph=True)
    try:
        return str(torch.autograd.grad(dq.square().sum(), q, allow_unused=True))
    except NotImplementedError as refusal:
        return str(refusal)


def test_a_second_derivative_on_a_mesh(pool) -> None:
    for said in pool.run(second_on_a_mesh, ranks=2):
        assert "no second derivative" in said


def test_jit_trace_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"torch\.export"):
        torch.jit.trace(eager, Q)


WRONG: dict[str, dict[str, Any]] = {
    "layout": {"layout": "spiral"},
    "transport": {"transport": "pigeon"},
    "backend": {"backend": "abacus"},
    "seq_len": {"seq_len": 7},
    "lengths": {"seq_len": (5, 5, 5)},
    "documents": {"cu_seqlens": (0, 2, 4)},
    "layout of documents": {"layout": usp.DocumentZigzag((0, 2, 4))},
    "window": {"window_size": (-1, None)},
    "dropout": {"dropout_p": 1.5},
    "scale": {"softmax_scale": float("nan")},
    "slopes": {"alibi_slopes": torch.ones(2).double().requires_grad_()},
}


@pytest.mark.parametrize("name", WRONG)
def test_compiled_refuses_what_eager_refuses(name: str) -> None:
    def attend() -> Tensor:
        return usp.long_context_attention(Q, K, V, **WRONG[name])

    with pytest.raises((ValueError, TypeError, NotImplementedError)) as refused:
        attend()
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r".") as compiled:
        torch.compile(attend, backend="aot_eager")()
    assert str(refused.value) in str(compiled.value)
