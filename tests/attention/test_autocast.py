"""Under the caller's autocast attention is that of inputs in autocast's dtype, to the bit.

Its own arithmetic (sums in fp32, exchanges, gradients) is the same inside and outside, forward
and backward, and wherever the backward is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from unittest.mock import patch

import pool as worker
import pytest
import torch
import torch.distributed as dist
from cases import Case, local
from judge import attend
from torch import Tensor, nn

import usp
from usp.backends import TABLE
from usp.nn.multihead import projections
from usp.ops.merge import merge
from usp.planning.problem import Traits

ON_CPU = Traits("cpu", torch.float32, 4, 4, 0.5)
BACKENDS = [backend.NAME for backend in TABLE if not backend.reasons_against(ON_CPU)]
LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CASE = Case(seq_len=31, batch=2, heads=6, kv_heads=2, head_dim=16, value_dim=16, causal=True)
EXTRAS = {"bias": "hq", "bias_hides": 0.1, "padding": 0.1, "alibi": "h", "softcap": 5.0}


def with_extras(case: Case) -> Case:
    return case if case.backend == "sdpa" else replace(case, **EXTRAS, return_lse=True)


def region(low: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", low, enabled=low is not None)


def attended(case: Case, forward: torch.dtype | None, backward: torch.dtype | None):
    """This rank's results with the two ways in autocast regions of their own."""
    mesh = worker.mesh(case.ulysses, case.ring) if case.on_mesh else None
    t = local(case, dist.get_rank() if case.on_mesh else 0)
    if forward is not None:
        t.dout = t.dout.to(forward)  # as the layer above in that region gives it
    return attend(case, t, mesh, region(forward), region(backward))


def of_rounded_inputs(case: Case, low: torch.dtype):
    """The same outside of any region, of inputs that were rounded by hand."""
    mesh = worker.mesh(case.ulysses, case.ring) if case.on_mesh else None
    t = local(case, dist.get_rank() if case.on_mesh else 0)
    t.q, t.k, t.v, t.dout = (x.to(low) for x in (t.q, t.k, t.v, t.dout))
    return attend(case, t, mesh)


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal to the bit: what the two differ in is the dtype of the leaves' gradients alone."""
    assert list(got) == list(wanted)
    for name, result in got.items():
        assert torch.equal(result, wanted[name].to(result.dtype)), name


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_device(backend: str, low: str) -> None:
    case = with_extras(replace(CASE, backend=backend, on_mesh=False, dtype="float32"))
    wanted = of_rounded_inputs(case, LOW[low])
    for way in ((LOW[low], None), (LOW[low], LOW[low]), (LOW[low], torch.float16)):
        got = attended(case, *way)
        assert got["out"].dtype == LOW[low] and got["dq"].dtype == torch.float32
        assert_same(got, wanted)
    # a backward in somebody's autocast of a forward without
    assert_same(attended(case, None, LOW[low]), attended(case, None, None))


@pytest.mark.parametrize("transport", ["ring", "allgather"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_meshes(pool, backend: str, transport: str) -> None:
    low = torch.bfloat16
    for ulysses, ring in ((1, 3), (2, 2)):
        case = replace(CASE, ulysses=ulysses, ring=ring, backend=backend, transport=transport)
        case = with_extras(replace(case, dtype="float32"))
        wanted = pool.run(of_rounded_inputs, case, low, ranks=case.ranks)
        for way in ((low, None), (low, low)):
            for got, right in zip(
                pool.run(attended, case, *way, ranks=case.ranks), wanted, strict=True
            ):
                assert_same(got, right)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial results are joined by torch's own ops."""
    monkeypatch.setattr("usp.ops.native._LOAD_ERROR", "not there")
    case = with_extras(replace(CASE, backend="reference", on_mesh=False, dtype="float32"))
    wanted = of_rounded_inputs(case, torch.bfloat16)
    assert_same(attended(case, torch.bfloat16, torch.bfloat16), wanted)


def test_triton(interpreter) -> None:
    case = replace(CASE, seq_len=9, head_dim=4, value_dim=4, backend="triton", ring=2)
    case = with_extras(replace(case, dtype="float32"))
    low = torch.bfloat16
    wanted = interpreter.run(of_rounded_inputs, case, low, ranks=2)
    for got, right in zip(interpreter.run(attended, case, low, low, ranks=2), wanted, strict=True):
        assert_same(got, right)


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """As on a machine with a GPU, for tensors on the CPU beside it."""
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_autocast_does_not_touch(dtype: str) -> None:
    """Autocast of another device, and fp64 inputs anywhere."""
    case = Case(seq_len=13, heads=2, kv_heads=2, bias="hq", on_mesh=False, backend="reference")
    case = replace(case, dtype=dtype, return_lse=True)

    def around() -> AbstractContextManager:
        return cuda_autocast() if dtype == "float32" else region(torch.bfloat16)

    got = attend(case, local(case, 0), None, around(), around())
    assert all(x.dtype == getattr(torch, dtype) for x in got.values())
    assert_same(got, attend(case, local(case, 0), None))


@pytest.mark.parametrize("dynamo", ["eager", "aot_eager"])
@pytest.mark.parametrize("inside", [False, True])
def test_compiled(dynamo: str, inside: bool) -> None:
    """The region around the compiled function, or in it."""
    x = local(replace(CASE, dtype="float32"), 0)

    def inner(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return usp.long_context_attention(q, k, v, causal=True, backend="reference")

    def outer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with region(torch.bfloat16):
            return inner(q, k, v)

    torch._dynamo.reset()
    compiled = torch.compile(outer if inside else inner, backend=dynamo, fullgraph=True)
    results = []
    for function, low in ((inner, None), (compiled, torch.bfloat16)):
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
        given = leaves if low else [leaf.bfloat16() for leaf in leaves]
        with region(None if inside else low):
            out = function(*given)
        with region(low):
            results.append([out, *torch.autograd.grad(out, leaves, x.dout.bfloat16())])
    for eager, graph in zip(*results, strict=True):
        assert torch.equal(eager, graph)


def between_projections(module: nn.Module, projected: Tensor, low: torch.dtype | None):
    """What a module makes of its projections, before that of the output; and every gradient."""
    leaf = projected.detach().requires_grad_()
    x, mask = torch.zeros(31, 2, 24), torch.linspace(-2, 2, 31 * 31).view(31, 31).sin()
    with (
        patch.object(projections, "_projections", lambda *_: leaf.view(31, 2, 3, 3, 8).unbind(2)),
        patch.object(module, "out_proj", nn.Identity()),
        region(low),
    ):
        outputs = module(x, x, x, attn_mask=mask)
    leaves = [leaf, module.bias_k, module.bias_v]
    with region(low):
        cotangents = [torch.cos(9 * y.detach().float()).to(y.dtype) for y in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]


def test_multihead_attention_between_its_projections() -> None:
    """Those are autocast's; the weights, extra keys and all gradients of them are ours."""
    torch.manual_seed(3)
    module = usp.MultiheadAttention(24, 3, add_bias_kv=True, add_zero_attn=True)
    projected = torch.randn(31, 2, 72).bfloat16()
    inside, outside = (between_projections(module, projected, x) for x in (torch.bfloat16, None))
    for got, wanted in zip(inside, outside, strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def moved(low: torch.dtype | None) -> list[Tensor]:
    """What else we compute: joined sequences, summed gradients, joined softmaxes."""
    mesh = worker.mesh(1, 3)
    x = torch.randn(2, 5, 4, requires_grad=True)
    parameter = nn.Parameter(torch.randn(7))
    parameter.grad = torch.randn(7) + dist.get_rank()
    lse = [torch.randn(2, 1, 5, requires_grad=True) for _ in range(2)]
    out = [torch.randn(2, 5, 1, 4, requires_grad=True) for _ in range(2)]
    with region(low):
        whole = usp.unshard_sequence(x, mesh, 1)
        usp.all_reduce_gradients([parameter], mesh)
        joined = merge(out[0], lse[0], out[1], lse[1])
        cotangents = [torch.randn_like(y) for y in (whole, *joined)]
        gradients = torch.autograd.grad((whole, *joined), [x, *out, *lse], cotangents)
    return [whole.detach(), parameter.grad, *(y.detach() for y in joined), *gradients]


def test_what_moves_and_joins(pool) -> None:
    inside, outside = (pool.run(moved, low, ranks=3) for low in (torch.bfloat16, None))
    for results in zip(inside, outside, strict=True):
        for got, wanted in zip(*results, strict=True):
            assert got.dtype == torch.float32 and torch.equal(got, wanted)
