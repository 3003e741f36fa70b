"""The function on one device: what users meet before they have a mesh."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import usp
from usp.testing import dense_attention


def qkv(*, length: int = 19, heads: int = 4, kv_heads: int = 2, dim: int = 8) -> list[Tensor]:
    torch.manual_seed(7)
    shapes = [(2, length, heads, dim), *[(2, length, kv_heads, dim)] * 2]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def agree(options: dict, tensors: list[Tensor], atol: float = 1e-11) -> None:
    """Output, LSE and every gradient equal the oracle's, with random cotangents."""
    out, lse = usp.long_context_attention(*tensors[:3], return_lse=True, **options)
    expected, expected_lse = dense_attention(*tensors[:3], **options)
    seen = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    torch.testing.assert_close(out, expected, rtol=0, atol=atol)
    torch.testing.assert_close(lse[seen], expected_lse[seen], rtol=0, atol=atol)
    cotangents = torch.randn_like(out), torch.randn_like(lse)[seen]
    got = torch.autograd.grad((out, lse[seen]), tensors, cotangents)
    want = torch.autograd.grad((expected, expected_lse[seen]), tensors, cotangents)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (2, 3)},
        {"causal": True, "prefix_len": 5, "window_size": (6, None)},
        {"cu_seqlens": (0, 0, 7, 8, 19), "causal": True},
        {"softcap": 1.5, "softmax_scale": 0.7},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
        {"alibi_slopes": torch.linspace(0.1, 1.0, 8).view(2, 4), "causal": True},
        {"key_padding_mask": torch.arange(19).expand(2, 19) % 3 == 1},
        {"key_padding_mask": torch.ones(2, 19, dtype=torch.bool)},
    ],
    ids=str,
)
def test_every_option_equals_the_oracle(options: dict) -> None:
    agree(options, qkv())


@pytest.mark.parametrize("shape", [(2, 4, 19, 19), (1, 4, 1, 19), (2, 1, 19, 19), (1, 1, 1, 19)])
def test_bias_and_its_gradient(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    hidden = torch.arange(19).expand(2, 19) == 4
    agree({"attn_bias": bias, "causal": True, "key_padding_mask": hidden}, [*qkv(), bias])


def test_cross_attention_and_another_value_dim() -> None:
    torch.manual_seed(2)
    q = torch.randn(1, 5, 6, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 13, 3, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 13, 3, 5, dtype=torch.float64, requires_grad=True)
    agree({"causal": True}, [q, k, v])


@pytest.mark.parametrize("length", [0, 1])
def test_short_sequences(length: int) -> None:
    agree({"causal": True}, qkv(length=length))


def test_strided_inputs_are_taken_as_they_are() -> None:
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in qkv())
    last = torch.randn(2, 19, 2, 16, dtype=torch.float64)[..., ::2]
    for values in (v, last):
        out = usp.long_context_attention(q, k, values)
        torch.testing.assert_close(out, dense_attention(q, k, values)[0], rtol=0, atol=1e-12)


def test_autocast_computes_in_its_dtype_as_sdpa_does() -> None:
    q, k, v = (x.detach().float() for x in qkv())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert usp.long_context_attention(q, k, v).dtype == torch.bfloat16
        sdpa = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, q, q)))
        assert sdpa.dtype == torch.bfloat16


def test_dropout_repeats_with_its_seed_and_keeps_the_mean() -> None:
    q, k, v = (x.detach() for x in qkv(length=64))
    torch.manual_seed(5)
    first = usp.long_context_attention(q, k, v, dropout_p=0.5)
    second = usp.long_context_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(5)
    assert torch.equal(usp.long_context_attention(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    samples = [
        usp.long_context_attention(q, k, v, dropout_p=0.3, dropout_seed=seed) for seed in range(200)
    ]
    off = torch.stack(samples).mean(0) - usp.long_context_attention(q, k, v)
    spread = torch.stack(samples).std(0) / 200**0.5
    assert (off.abs() / spread).square().mean() < 1.3


def test_a_named_backend_never_falls_back() -> None:
    q, k, v = (x.detach() for x in qkv())
    with pytest.raises(NotImplementedError, match="sdpa: it has no softcap"):
        usp.long_context_attention(q, k, v, softcap=2.0, backend="sdpa")
    with pytest.raises(ValueError, match=r"'fast'.*native, sdpa, reference"):
        usp.long_context_attention(q, k, v, backend="fast")


def test_backends_say_whether_they_can_run() -> None:
    told = usp.backends()
    assert list(told)[:4] == ["triton", "native", "sdpa", "reference"]
    assert told["reference"] == told["sdpa"] == "can run here"


def test_double_backward_is_refused_not_wrong() -> None:
    q, k, v = qkv(length=5)
    (dq,) = torch.autograd.grad(
        usp.long_context_attention(q, k, v).square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.sum().backward()


def test_default_device_does_not_leak_into_planning() -> None:
    q, k, v = (x.detach() for x in qkv())
    with torch.device("meta"):
        out = usp.long_context_attention(q, k, v, causal=True, cu_seqlens=(0, 4, 19))
    expected, _ = dense_attention(q, k, v, causal=True, cu_seqlens=(0, 4, 19))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
