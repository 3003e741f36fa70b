"""usp.MultiheadAttention against torch.nn.MultiheadAttention on one device, in fp64."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import usp

F64 = torch.float64


@dataclass(frozen=True)
class Case:
    """One call of an attention module: how it is built, and with what it is called."""

    seed: int = 0
    batch: int = 2
    query_len: int = 7
    key_len: int = 7
    num_heads: int = 3
    head_dim: int = 4
    kdim: int | None = None
    vdim: int | None = None
    bias: bool = True
    add_bias_kv: bool = False
    add_zero_attn: bool = False
    batch_first: bool = False
    batched: bool = True
    inputs: str = "self"  # self: one tensor; memory: key is value; cross: three tensors
    padding: str | None = None  # bool | float
    mask: str | None = None  # bool | float | causal
    mask_dims: int = 2
    need_weights: bool = True
    average: bool = True
    training: bool = True

    @property
    def embed_dim(self) -> int:
        return self.num_heads * self.head_dim

    def arguments(self) -> dict[str, object]:
        names = ("embed_dim", "num_heads", "bias", "add_bias_kv", "add_zero_attn")
        names += ("kdim", "vdim", "batch_first")
        return {name: getattr(self, name) for name in names} | {"dtype": F64}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    inputs = draw(st.sampled_from(["self", "memory", "cross"]))
    query_len = draw(st.integers(1, 13))
    dims = st.one_of(st.none(), st.integers(1, 9))
    batched = draw(st.booleans())
    return Case(
        seed=draw(st.integers(0, 2**20)),
        batch=draw(st.integers(1, 3)) if batched else 1,
        query_len=query_len,
        key_len=query_len if inputs == "self" else draw(st.integers(1, 13)),
        num_heads=num_heads,
        head_dim=head_dim,
        kdim=draw(dims) if inputs == "cross" else None,
        vdim=draw(dims) if inputs == "cross" else None,
        bias=draw(st.booleans()),
        add_bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        batched=batched,
        inputs=inputs,
        padding=draw(st.sampled_from([None, "bool", "float"])),
        mask=draw(st.sampled_from([None, "bool", "float", "causal"])),
        mask_dims=draw(st.sampled_from([2, 3])),
        need_weights=draw(st.booleans()),
        average=draw(st.booleans()),
        training=draw(st.booleans()),
    )


def make_tensors(case: Case) -> dict[str, Tensor]:
    """Inputs and masks of whole sequences; every row sees at least the first key."""
    g = torch.Generator().manual_seed(case.seed)

    def random(length: int, dim: int) -> Tensor:
        shape = (case.batch, length, dim) if case.batch_first else (length, case.batch, dim)
        x = torch.randn(shape, generator=g, dtype=F64)
        return x if case.batched else x.squeeze(0 if case.batch_first else 1)

    tensors = {"query": random(case.query_len, case.embed_dim)}
    if case.inputs != "self":
        tensors["key"] = random(case.key_len, case.kdim or case.embed_dim)
    if case.inputs == "cross":
        tensors["value"] = random(case.key_len, case.vdim or case.embed_dim)
    if case.padding:
        shape = (case.batch, case.key_len)
        padding = torch.rand(shape, generator=g) < 0.3
        padding[:, 0] = False
        if case.padding == "float":
            padding = torch.randn(shape, generator=g, dtype=F64).masked_fill(padding, -torch.inf)
        tensors["key_padding_mask"] = padding if case.batched else padding[0]
    if case.mask:
        tensors["attn_mask"] = make_mask(case, g)
    return tensors


def make_mask(case: Case, g: torch.Generator) -> Tensor:
    shape = (case.query_len, case.key_len)
    if case.mask_dims == 3:
        shape = (case.batch * case.num_heads, *shape)
    hidden = torch.rand(shape, generator=g) < 0.3
    if case.mask == "causal":
        hidden = torch.ones(shape, dtype=torch.bool).triu(1)
    hidden[..., 0] = False
    if case.mask == "float":
        return torch.randn(shape, generator=g, dtype=F64).masked_fill(hidden, -torch.inf)
    return hidden


def call(module: nn.MultiheadAttention, case: Case, tensors: dict[str, Tensor]):
    tensors = dict(tensors)
    query = tensors.pop("query")
    key = tensors.pop("key", query)
    value = tensors.pop("value", key)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Support for mismatched")
        return module(
            query,
            key,
            value,
            need_weights=case.need_weights,
            average_attn_weights=case.average,
            **tensors,
        )


def run(module: nn.MultiheadAttention, case: Case) -> dict[str, Tensor]:
    """Output, weights, and the gradients of every parameter and floating input."""
    tensors = make_tensors(case)
    for tensor in tensors.values():
        tensor.requires_grad_(tensor.is_floating_point())
    module.train(case.training)
    results = call(module, case, tensors)
    assert isinstance(results, tuple) and len(results) == 2
    assert (results[1] is not None) == case.need_weights
    named = {k: t for k, t in tensors.items() if t.requires_grad} | dict(module.named_parameters())
    outputs = [r for r in results if r is not None]
    g = torch.Generator().manual_seed(case.seed + 1)
    cotangents = [torch.randn(r.shape, generator=g, dtype=F64) for r in outputs]
    gradients = torch.autograd.grad(outputs, list(named.values()), cotangents, allow_unused=True)
    found = {f"grad {k}": g for k, g in zip(named, gradients, strict=True) if g is not None}
    return found | {f"output {i}": r.detach() for i, r in enumerate(outputs)}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-9):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        torch.testing.assert_close(
            ours[name], expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def make_pair(case: Case) -> tuple[nn.MultiheadAttention, usp.MultiheadAttention]:
    torch.manual_seed(case.seed)
    theirs = nn.MultiheadAttention(**case.arguments())
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter))
    ours = usp.MultiheadAttention(**case.arguments())
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@settings(max_examples=300)
@given(cases())
def test_equals_torch(case: Case):
    theirs, ours = make_pair(case)
    # in evaluation torch may take a fused path, with less precision: compare with the plain one
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = run(theirs, case)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert_same(run(ours, case), expected)


@pytest.mark.parametrize("kdim", [None, 5])
def test_same_initialisation_and_state(kdim):
    case = Case(kdim=kdim, add_bias_kv=True)
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(**case.arguments())
    torch.manual_seed(3)
    ours = usp.MultiheadAttention(**case.arguments())
    assert isinstance(ours, nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    torch.manual_seed(4)
    ours._reset_parameters()
    torch.manual_seed(4)
    theirs._reset_parameters()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
