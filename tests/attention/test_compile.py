"""torch.compile on one device: one graph, equal to eager."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from random import Random
from typing import Any

import compiling
import pytest
import torch
import torch._inductor.config
from mask_cases import any_mask
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

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


TABLES = [masks.from_dense(masks.blocks((0, n, 11)).dense(11, 11)) for n in (4, 5)]
# One form each, calls that differ in numbers alone; the last is the first one, made anew.
CALLS: dict[str, list[dict[str, Any]]] = {
    "mask": [
        {"mask": masks.causal() & (masks.window(left, None) | masks.first_keys(keys))}
        for left, keys in ((2, 1), (3, 0), (5, 2), (9, 1), (2, 1))
    ],
    "complement": [{"mask": ~masks.window(n, 0)} for n in (2, 3, 5, 6, 2)],
    "neighbourhood": [
        {"mask": masks.neighbourhood((rows, 3), (3, 2), edges="shift", start=2)}
        for rows in (3, 2, 1, 3)
    ],
    "table": [{"mask": table} for table in (*TABLES, TABLES[0])],
    "one a sample": [{"mask": [masks.causal(n), masks.window(n, n)]} for n in (2, 1, 3, 4, 2)],
    "key_lengths": [{"key_lengths": (5, n)} for n in (11, 7, 3, 0, 11)],
    "a tensor of key_lengths": [{"key_lengths": torch.tensor((5, n))} for n in (11, 7, 3, 0, 11)],
    "query_offset": [{"causal": True, "query_offset": n} for n in (3, 2, 5, 9, 3)],
    "query_offset of each": [
        {"causal": True, "query_offset": torch.tensor((n, -n))} for n in (3, 2, 5, 3)
    ],
    "documents of each": [{"cu_seqlens": [(0, 11), (0, n, 11)]} for n in (3, 2, 5, 9, 3)],
}


def masked(given: dict[str, Any]) -> tuple[Tensor, ...]:
    q, k, v = given["q"] * 2, given["k"], given["v"]
    return (usp.long_context_attention(q, k, v, **given["options"]) * 2,)


def assert_equal(compiled: Any, options: dict[str, Any]) -> None:
    """As eager, to the bit."""
    given = {name: x for name, x in tensors().items() if name in "qkv"}
    found, wanted = (
        results(lambda x, f=function: f(x | {"options": options}), given)
        for function in (compiled, masked)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), options


@pytest.mark.parametrize("name", CALLS)
def test_new_masks_do_not_compile_again(name: str) -> None:
    """Numbers of a mask are symbols from the second one on, and values of tensors are read."""
    compiler = compiling.Counting("aot_eager")
    compiled = torch.compile(masked, fullgraph=True, backend=compiler)
    for options in CALLS[name]:
        assert_equal(compiled, options)
    assert compiler.graphs <= 2


@pytest.mark.parametrize("compiler", COMPILERS)
def test_masks_of_another_form_are_another_graph(compiler: str) -> None:
    """No graph of another mask is taken: whatever was called before, the result is that of now."""
    compiled = torch.compile(masked, fullgraph=True, backend=compiler)
    one, other = (any_mask(Random(seed), 11, 11)[0] for seed in (3, 10))
    for mask in (one, other, [one, other], [other, one], one):
        assert_equal(compiled, {"mask": mask, "key_lengths": [11, 4]})


def test_lists_that_change_in_their_place() -> None:
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    options: dict[str, Any] = {
        "mask": [masks.window(2, 2), masks.causal()],
        "key_lengths": [5, 11],
        "query_offset": torch.tensor([0, 1]),
        "cu_seqlens": None,
    }
    assert_equal(compiled, options)
    options["mask"][0] = masks.window(3, 0)
    assert_equal(compiled, options)
    options["mask"][1] = masks.first_keys(3)
    assert_equal(compiled, options)
    options["key_lengths"][0] = 2
    assert_equal(compiled, options)
    options["query_offset"][1] = -2
    assert_equal(compiled, options)


def test_lengths_written_over_before_the_backward() -> None:
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    leaves = {name: x for name, x in tensors().items() if name in "qkv"}
    found = []
    for function in (masked, compiled):
        lengths = torch.tensor((3, 11))
        (out,) = function(leaves | {"options": {"key_lengths": lengths}})
        lengths[0] = 5
        found.append(torch.autograd.grad(out, list(leaves.values()), torch.cos(out.detach())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_masks_made_inside_of_a_graph() -> None:
    def model(given: dict[str, Any]) -> tuple[Tensor, ...]:
        mask = masks.causal() & (masks.window(given["options"], 0) | masks.first_keys(2))
        return masked(given | {"options": {"mask": mask}})

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    given = {name: x for name, x in tensors().items() if name in "qkv"}
    for left in (2, 3, 11):
        found, wanted = (
            results(lambda x, f=function, n=left: f(x | {"options": n}), given)
            for function in (compiled, model)
        )
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_mask_of_a_module() -> None:
    """What its attribute says when it is called counts."""
    module = usp.LongContextAttention(mask=masks.window(2, 2))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    q, k, v = (tensors()[name] for name in "qkv")
    for mask in (masks.window(2, 2), masks.window(1, 2), masks.causal(), masks.window(2, 2)):
        module.mask = mask
        assert torch.equal(compiled(q, k, v), usp.long_context_attention(q, k, v, mask=mask))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"key_lengths": (1, 2, 3)}, "key_lengths has 3 entries"),
        ({"mask": [masks.causal()] * 3}, "mask has 3 entries"),
        ({"mask": "causal"}, "mask must be a mask of usp.masks"),
        ({"mask": TABLES[0], "query_offset": 2}, "made of 11 queries"),
    ],
)
def test_wrong_masks_are_refused_in_a_graph(options: dict[str, Any], said: str) -> None:
    compiled = torch.compile(masked, backend="aot_eager")
    given = {name: x for name, x in tensors().items() if name in "qkv"}
    with pytest.raises(Exception, match=said):
        compiled(given | {"options": options})


def test_a_saved_program_knows_its_mask() -> None:
    """All of it: nothing is kept beside the graph."""

    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return usp.long_context_attention(q, k, v, mask=TABLES[0] | masks.first_keys(2))

    given = tuple(tensors()[name].detach() for name in "qkv")
    saved = io.BytesIO()
    torch.export.save(torch.export.export(Model(), given), saved)
    saved.seek(0)
    assert torch.equal(torch.export.load(saved).module()(*given), Model()(*given))


@pytest.mark.parametrize("name", CALLS)
def test_shapes_alone(name: str) -> None:
    """Masks and lengths that have values, beside tensors that have none."""
    for options in CALLS[name][:2]:
        with FakeTensorMode() as mode:
            given = {n: mode.from_tensor(x) for n, x in tensors().items() if n in "qkv"}
            out, *gradients = results(lambda x, o=options: masked(x | {"options": o}), given)
        assert out.shape == (2, 11, 4, 3)
        assert [g.shape for g in gradients] == [x.shape for x in given.values()]


def test_a_boolean_mask_is_a_bias_in_a_graph() -> None:
    seen = torch.ones(11, 11, dtype=torch.bool).tril()

    def model(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (usp.long_context_attention(given["q"], given["k"], given["v"], attn_mask=seen) * 2,)

    given = {name: x for name, x in tensors().items() if name in "qkv"}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, given), results(model, given), 1e-12)
