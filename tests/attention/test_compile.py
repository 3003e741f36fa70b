"""torch.compile: one device without a graph break, a mesh with just one; equal to eager."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import multihead_cases as multihead
import pool as worker
import pytest
import torch
import torch._functorch.config
import torch._inductor.config
import torch.distributed as dist
from cases import Case, local
from judge import assert_close, join, oracle
from torch import Tensor

import usp

COMPILERS = ["aot_eager"]
if shutil.which("g++") or shutil.which("clang++"):
    COMPILERS.append("inductor")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (4, None), "softmax_scale": 0.3},
    "documents": {"cu_seqlens": (0, 3, 11)},
    "prefix": {"causal": True, "prefix_len": 2, "softcap": 2.0},
    "lse": {"return_lse": True},
    "dropout": {"dropout_p": 0.4, "dropout_seed": 2**61 + 3},
    "everything": {
        "causal": True,
        "window_size": (6, 1),
        "softcap": 4.0,
        "dropout_p": 0.2,
        "dropout_seed": 5,
        "return_lse": True,
    },
}


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    """Also on the disk: traces there are found by names of ops, not by what their fakes return."""
    torch._dynamo.reset()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def tensors(dtype: torch.dtype = torch.float64, length: int = 11) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    return {
        "q": normal(2, length, 4, 5).requires_grad_(),
        "k": normal(2, length, 2, 5).requires_grad_(),
        "v": normal(2, length, 2, 3).requires_grad_(),
        "attn_bias": normal(1, 4, 1, length).requires_grad_(),
        "alibi_slopes": normal(4).abs(),
        "key_padding_mask": torch.rand(2, length, generator=random) < 0.2,
    }


def results(function: Any, given: dict[str, Tensor]) -> list[Tensor]:
    """Outputs and gradients; the projection before and after makes the graph more than one op."""
    torch.manual_seed(7)
    leaves = [x for x in given.values() if x.requires_grad]
    outputs = function(given)
    random = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=random, dtype=x.dtype) for x in outputs]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, leaves, cotangents))


def assert_same(ours: list[Tensor], eager: list[Tensor], tolerance: float) -> None:
    assert len(ours) == len(eager)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", OPTIONS)
def test_one_device_is_one_graph(name: str, compiler: str) -> None:
    def model(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        q, k, v = given["q"] * 2, given["k"] + 1, given["v"]
        extras = {x: given[x] for x in ("attn_bias", "alibi_slopes", "key_padding_mask")}
        result = usp.long_context_attention(q, k, v, **OPTIONS[name], **extras)
        out, *lse = result if isinstance(result, tuple) else (result,)
        return (torch.tanh(out), *lse)

    eager = results(model, tensors())
    compiled = results(torch.compile(model, fullgraph=True, backend=compiler), tensors())
    assert_same(compiled, eager, 1e-9)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_drawn_dropout_seed(compiler: str) -> None:
    """Inductor draws from a generator of its own, unless it is told to be as eager is."""

    def model(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (usp.long_context_attention(given["q"], given["k"], given["v"], dropout_p=0.4),)

    given = {name: x for name, x in tensors().items() if name in "qkv"}
    with torch._inductor.config.patch(fallback_random=True):
        compiled = results(torch.compile(model, fullgraph=True, backend=compiler), given)
    assert_same(compiled, results(model, given), 1e-9)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_module_in_low_precision(dtype: torch.dtype, compiler: str) -> None:
    module = usp.LongContextAttention(causal=True)

    def model(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (module(given["q"], given["k"], given["v"]) * 2,)

    given = {name: x for name, x in tensors(dtype).items() if name in "qkv"}
    compiled = results(torch.compile(model, fullgraph=True, backend=compiler), given)
    assert_same(compiled, results(model, given), 1e-6 if dtype == torch.float32 else 1e-2)


def test_other_lengths_do_not_compile_for_ever() -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def model(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (usp.long_context_attention(given["q"], given["k"], given["v"], causal=True),)

    compiled = torch.compile(model, fullgraph=True, backend=counting)
    for length in (11, 7, 13, 29):
        given = {name: x for name, x in tensors(length=length).items() if name in "qkv"}
        assert_same(results(compiled, given), results(model, given), 1e-12)
    assert graphs <= 2, "lengths are symbolic from the second one on"


def test_a_wrong_call_is_refused_while_compiling() -> None:
    compiled = torch.compile(usp.long_context_attention, backend="aot_eager")
    q = torch.randn(1, 4, 3, 2)
    with pytest.raises(Exception, match="multiple"):
        compiled(q, q[:, :, :2], q[:, :, :2])


class Counting:
    """A compiler that runs graphs as they are, and counts those with work in them."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        # what dynamo notes of a tensor's attributes makes a graph without work: none is split
        calls = [n for n in graph.graph.nodes if n.op in ("call_function", "call_method")]
        self.graphs += any(n.target is not getattr for n in calls)
        return graph.forward


def compiled_on_a_mesh(case: Case) -> tuple[dict[str, Tensor], int]:
    counting = Counting()
    mesh = worker.mesh(case.ulysses, case.ring)
    module = usp.LongContextAttention(mesh, causal=case.causal, seq_len=case.seq_len)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return module(q * 2, k, v) * 2

    t = local(case, dist.get_rank())
    leaves = [x.clone().requires_grad_() for x in (t.q / 2, t.k, t.v)]
    out = torch.compile(model, fullgraph=True, backend=counting)(*leaves)
    dq, dk, dv = torch.autograd.grad(out, leaves, t.dout / 2)
    return {"out": out.detach() / 2, "dq": dq / 2, "dk": dk, "dv": dv}, counting.graphs


def test_a_mesh_breaks_the_graph_once_and_is_right(pool) -> None:
    case = Case(ulysses=2, ring=2, seq_len=13, heads=3, kv_heads=3, causal=True)
    parts = pool.run(compiled_on_a_mesh, case, ranks=4, timeout=120)
    assert_close(case, join(case, [results for results, _ in parts]), oracle(case))
    assert [graphs for _, graphs in parts] == [2] * 4


def compiled_multihead(case: multihead.Case, place: multihead.Place) -> multihead.Results:
    return multihead.on_worker(case, place, Counting())


MULTIHEAD = {
    "plain": multihead.Case(need_weights=False),
    # float padding, weights and lengths to be inferred: three more things that are communicated
    "everything": multihead.Case(
        inputs="memory", key_len=11, padding="float", mask="float", add_bias_kv=True
    ),
}


@pytest.mark.parametrize("name", MULTIHEAD)
def test_multihead_attention_on_a_mesh(pool, name: str) -> None:
    case, place = MULTIHEAD[name], multihead.Place(2, 1, infer=name == "everything")
    parts = pool.run(compiled_multihead, case, place, ranks=2, timeout=120)
    multihead.assert_same(multihead.join(case, place, parts), multihead.by_torch(case))


def graphs_of_multihead() -> tuple[int, bool]:
    mesh, counting = worker.mesh(2, 1), Counting()
    module = usp.MultiheadAttention(12, 3, mesh=mesh, batch_first=True, validate="never")
    x = torch.randn(2, 5, 12)
    wanted = module(x, x, x, need_weights=False)[0]
    found = torch.compile(module, backend=counting)(x, x, x, need_weights=False)[0]
    return counting.graphs, torch.equal(found, wanted)


def test_multihead_attention_breaks_the_graph_once(pool) -> None:
    assert pool.run(graphs_of_multihead, ranks=2, timeout=120) == [(2, True)] * 2
