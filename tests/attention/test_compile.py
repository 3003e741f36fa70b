"""torch.compile on one device: one graph, equal to eager."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import compiling
import pytest
import torch
import torch._inductor.config
from torch import Tensor

import usp
from usp import masks
from usp.attention.given import Options, Tensors
from usp.attention.op_arguments import arguments

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
    with compiling.afresh():
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
    compiler = compiling.Counting()

    def model(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (usp.long_context_attention(given["q"], given["k"], given["v"], causal=True),)

    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for length in (11, 7, 13, 29):
        given = {name: x for name, x in tensors(length=length).items() if name in "qkv"}
        assert_same(results(compiled, given), results(model, given), 1e-12)
    assert compiler.graphs <= 2, "lengths are symbolic from the second one on"


def test_new_documents_do_not_compile_again() -> None:
    """Their boundaries are read when the graph runs, also where their number changes."""
    compiler = compiling.Counting()

    def model(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return usp.long_context_attention(q * 2, k, v, cu_seqlens=cu_seqlens, causal=True) * 2

    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    q, k, v = (tensors()[name] for name in "qkv")
    for bounds in ((0, 3, 11), (0, 11, 11), (0, 1, 6, 11), (0, 2, 4, 6, 11), (0, 5, 7, 11)):
        found, wanted = (f(q, k, v, torch.tensor(bounds)) for f in (compiled, model))
        assert torch.equal(found, wanted)
    assert compiler.graphs <= 2, "the number of documents is symbolic from the second one on"
    with pytest.raises(ValueError, match="cu_seqlens ends at 7"):
        compiled(q, k, v, torch.tensor((0, 7)))


def test_documents_written_over_before_the_backward() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return usp.long_context_attention(q, k, v, cu_seqlens=cu_seqlens)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    leaves = [tensors()[name] for name in "qkv"]
    found = []
    for function in (model, compiled):
        bounds = torch.tensor((0, 3, 11))
        out = function(*leaves, bounds)
        bounds[1] = 5
        found.append(torch.autograd.grad(out, leaves, torch.cos(out.detach())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_the_op_is_what_its_schema_says(name: str) -> None:
    given = tensors(length=5)
    held = Tensors(**given)
    call = arguments(held, Options(**options_of(name)), None, None, None)
    torch.library.opcheck(torch.ops.usp.attention.default, tuple(call))


def options_of(name: str) -> dict[str, Any]:
    return {option: x for option, x in OPTIONS[name].items() if option != "dropout_seed"}


def test_a_wrong_call_is_refused_while_compiling() -> None:
    compiled = torch.compile(usp.long_context_attention, backend="aot_eager")
    q = torch.randn(1, 4, 3, 2)
    with pytest.raises(Exception, match="multiple"):
        compiled(q, q[:, :, :2], q[:, :, :2])


@pytest.mark.parametrize("name", ["mask", "one a sample", "key_lengths", "query_offset"])
def test_masks_end_a_graph(name: str) -> None:
    """They are values that no graph holds; what is computed is right, also with another mask."""
    first, second = masks.window(2, 2) & masks.causal(), masks.window(5, 0) | masks.first_keys(2)
    calls: list[dict[str, Any]] = {
        "mask": [{"mask": first}, {"mask": second}],
        "one a sample": [{"mask": [first, second]}, {"mask": [second, first]}],
        "key_lengths": [{"key_lengths": (5, 11)}, {"key_lengths": torch.tensor((7, 3))}],
        "query_offset": [{"causal": True, "query_offset": offset} for offset in (3, 1)],
    }[name]
    compiler = compiling.Counting("aot_eager")

    def model(given: dict[str, Any]) -> tuple[Tensor, ...]:
        q, k, v = given["q"] * 2, given["k"], given["v"]
        return (usp.long_context_attention(q, k, v, **given["options"]) * 2,)

    compiled = torch.compile(model, backend=compiler)
    for options in calls:
        given = {name: x for name, x in tensors().items() if name in "qkv"}
        found, wanted = (
            results(lambda x, f=function, o=options: f(x | {"options": o}), given)
            for function in (compiled, model)
        )
        assert_same(found, wanted, 1e-12)
    assert compiler.graphs >= 2


def test_a_boolean_mask_is_a_bias_in_a_graph() -> None:
    seen = torch.ones(11, 11, dtype=torch.bool).tril()

    def model(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (usp.long_context_attention(given["q"], given["k"], given["v"], attn_mask=seen) * 2,)

    given = {name: x for name, x in tensors().items() if name in "qkv"}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, given), results(model, given), 1e-12)
