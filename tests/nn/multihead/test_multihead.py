"""usp.MultiheadAttention is torch.nn.MultiheadAttention: one device, every argument, in fp64."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from multihead_cases import F64, Case, assert_same, by_torch, by_us, cases, make_ours, make_tensors
from torch import nn

import usp
from usp.nn.multihead import weights as attention_weights

PLAIN = Case()


@settings(max_examples=2 * settings().max_examples)
@given(cases())
def test_equals_torch(case: Case) -> None:
    assert_same(by_us(case), by_torch(case))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(None, None), (2, None), (0, 1), (3, 0)])
def test_interval_masks_equal_a_dense_mask(causal, window) -> None:
    case = replace(PLAIN, causal=causal, window=window)
    assert_same(by_us(case), by_torch(case))


@pytest.mark.parametrize("kdim", [None, 5])
def test_same_initialisation_and_state(kdim) -> None:
    arguments = replace(PLAIN, kdim=kdim, add_bias_kv=True).arguments()
    modules = []
    for kind in (nn.MultiheadAttention, usp.MultiheadAttention):
        torch.manual_seed(3)
        modules.append(kind(**arguments))
    theirs, ours = modules
    assert isinstance(ours, nn.MultiheadAttention)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    for module in modules:
        torch.manual_seed(4)
        module._reset_parameters()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def test_from_torch_shares_parameters_and_settings() -> None:
    theirs = nn.MultiheadAttention(12, 3, dropout=0.2, batch_first=True, kdim=5, vdim=7)
    theirs.eval().requires_grad_(False)
    calls = []
    theirs.register_forward_hook(lambda module, inputs, output: calls.append(module))
    ours = usp.MultiheadAttention.from_torch(theirs, causal=True)
    assert type(theirs) is nn.MultiheadAttention and theirs._qkv_same_embed_dim is False
    assert type(ours) is usp.MultiheadAttention and ours.placement.causal
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == other.keys() and all(mine[n] is other[n] for n in mine)
    assert (ours.training, ours.dropout, ours.batch_first) == (False, 0.2, True)
    ours(torch.randn(1, 4, 12), torch.randn(1, 4, 5), torch.randn(1, 4, 7))
    assert calls == [ours]
    ours.register_forward_hook(lambda module, inputs, output: None)
    assert len(theirs._forward_hooks) == 1


def test_from_torch_leaves_the_original_alone() -> None:
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    usp.MultiheadAttention.from_torch(theirs)
    assert theirs._qkv_same_embed_dim is True
    assert "placement" not in vars(theirs)


def test_classes_of_their_own_are_refused() -> None:
    class Own(nn.MultiheadAttention):
        pass

    with pytest.raises(NotImplementedError, match="Own is not nn"):
        usp.MultiheadAttention.from_torch(Own(4, 2))
    parametrized = nn.MultiheadAttention(4, 2)
    nn.utils.parametrizations.weight_norm(parametrized, "in_proj_weight")
    with pytest.raises(NotImplementedError, match="remove parametrizations"):
        usp.MultiheadAttention.from_torch(parametrized)


def test_copies_pickles_and_saves() -> None:
    case = replace(PLAIN, add_bias_kv=True)
    module = make_ours(case, layout="zigzag")
    x = make_tensors(case)["query"]
    expected = module(x, x, x)[0]
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ]
    for other in copies:
        assert other.placement == module.placement
        assert torch.equal(other(x, x, x)[0], expected)
        assert other.in_proj_weight is not module.in_proj_weight


def test_repr_names_what_was_chosen() -> None:
    text = repr(usp.MultiheadAttention(8, 2, layout="zigzag", causal=True))
    assert "embed_dim=8" in text and "layout='zigzag'" in text and "causal=True" in text
    assert not any(name in text for name in ("transport", "told", "named_lengths"))


def test_constructor_refusals() -> None:
    with pytest.raises(AssertionError, match="divisible"):
        usp.MultiheadAttention(10, 3)
    with pytest.raises(ValueError, match="greater than 0"):
        usp.MultiheadAttention(0, 3)
    for options, message in [
        ({"layout": "spiral"}, "spiral"),
        ({"transport": "pigeon"}, "pigeon"),
        ({"backend": "abacus"}, "abacus"),
        ({"validate": "sometimes"}, "sometimes"),
        ({"seq_len": "long"}, "long"),
        ({"window_size": (-1, None)}, "-1"),
        ({"chunks": 0}, "chunks must be 1 or more, got 0"),
        ({"offload": "disk"}, "got 'disk'"),
    ]:
        with pytest.raises(ValueError, match=message):
            usp.MultiheadAttention(8, 2, **options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_call_refusals() -> None:
    module = usp.MultiheadAttention(8, 2, kdim=6, vdim=5)
    q, k, v = torch.randn(3, 2, 8), torch.randn(4, 2, 6), torch.randn(4, 2, 5)
    module(q, k, v)
    with pytest.raises(RuntimeError, match="is_causal is a hint about attn_mask"):
        module(q, k, v, is_causal=True)
    wrong = [
        ((q[..., :7], k, v), {}, "query must have 8 features, got 7"),
        ((q, q, v), {}, "key must have 6 features, got 8"),
        ((q, k[0], v), {}, "query has 3 dims, key has 2"),
        ((q[None], k, v), {}, "query has 4 dims"),
        ((q, k[:, :1], v), {}, "query has 2, key has 1"),
        ((q, k, v[:3]), {}, r"key is \(4, 2, 6\), value \(3, 2, 5\)"),
        ((q, k, v), {"key_padding_mask": torch.zeros(4, 2)}, r"\(2, 4\), got \(4, 2\)"),
        ((q, k, v), {"attn_mask": torch.zeros(4, 3)}, r"\(3, 4\) or \(4, 3, 4\), got \(4, 3\)"),
        ((q, k, v), {"attn_mask": torch.zeros(3, 4).int()}, "torch.int32"),
    ]
    for inputs, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            module(*inputs, **options)
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    module = usp.MultiheadAttention(8, 2, batch_first=True)
    with pytest.raises(NotImplementedError, match="use_nested_tensor"):
        module(nested, nested, nested)


def test_a_true_hint_needs_no_square_memory(monkeypatch) -> None:
    seen = []
    real = usp.nn.multihead.forward.functional.attend

    def spy(tensors, told, *args):
        seen.append((told["causal"], tensors.attn_bias))
        return real(tensors, told, *args)

    monkeypatch.setattr(usp.nn.multihead.forward.functional, "attend", spy)
    module = usp.MultiheadAttention(8, 2)
    x = torch.randn(5, 1, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    padding = torch.zeros(1, 5)
    module(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    assert seen.pop() == (True, None)
    # here torch goes by the mask, whatever the hint says, and so do we
    module(x, x, x, attn_mask=mask, is_causal=True)
    module(x, x, x, padding, attn_mask=mask, is_causal=True, need_weights=False)
    assert all(not causal and bias is not None for causal, bias in seen)


def test_rows_that_see_nothing_are_zero() -> None:
    module = usp.MultiheadAttention(6, 3, dtype=F64)
    x = torch.randn(4, 1, 6, dtype=F64, requires_grad=True)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[2] = True
    out, weights = module(x, x, x, attn_mask=mask)
    assert torch.equal(out[2, 0], module.out_proj.bias)
    assert torch.equal(weights[0, 2], torch.zeros(4, dtype=F64))
    (out.sin().sum() + weights.sin().sum()).backward()
    assert x.grad.isfinite().all()
    assert module.in_proj_weight.grad.isfinite().all()


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_dropped_weights_are_those_that_made_the_output(extra, average) -> None:
    p, case = 0.4, replace(PLAIN, query_len=31, key_len=31, add_bias_kv=extra, add_zero_attn=extra)
    module = make_ours(case)
    x = make_tensors(case)["query"]
    plain = module(x, x, x, average_attn_weights=False)[1]
    module.dropout = p
    torch.manual_seed(1)
    out, weights = module(x, x, x, average_attn_weights=False)
    torch.manual_seed(1)
    again, shown = module(x, x, x, average_attn_weights=average)
    assert torch.equal(out, again)
    assert torch.equal(shown, weights.mean(1) if average else weights)
    assert not torch.equal(module(x, x, x)[0], out)
    kept = weights != 0
    torch.testing.assert_close(weights[kept], (plain / (1 - p))[kept], rtol=1e-12, atol=0)
    assert 0.35 < 1 - kept.double().mean() < 0.45
    v = nn.functional.linear(
        x, *(t.chunk(3)[2] for t in (module.in_proj_weight, module.in_proj_bias))
    )
    v = v.unflatten(-1, (3, 4))
    if extra:
        v = torch.cat(
            (v, module.bias_v.view(1, 1, 3, 4).expand(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
        )
    mixed = torch.einsum("nhls,snhd->lnhd", weights, v).flatten(2)
    torch.testing.assert_close(module.out_proj(mixed), out, rtol=0, atol=1e-10)
    module.eval()
    torch.testing.assert_close(module(x, x, x, average_attn_weights=False)[1], plain)


def test_dropout_has_a_right_gradient() -> None:
    case = replace(PLAIN, dropout=0.3, add_bias_kv=True, add_zero_attn=True, batch=1)
    module = make_ours(case)

    def call(x):
        torch.manual_seed(2)
        return module(x, x, x)

    x = make_tensors(case)["query"].requires_grad_()
    assert torch.autograd.gradcheck(call, (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("extra", [False, True])
def test_other_dtypes(dtype, extra) -> None:
    case = replace(PLAIN, query_len=23, key_len=23, add_bias_kv=extra, add_zero_attn=extra)
    module, x = make_ours(case), make_tensors(case)["query"]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.3)
    exact = module(x, x, x)
    out, weights = module.to(dtype)(*[x.to(dtype)] * 3)
    assert out.dtype == weights.dtype == dtype
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weights.double(), exact[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_autocast_gives_the_dtypes_of_torch(extra, training) -> None:
    theirs = nn.MultiheadAttention(8, 2, add_bias_kv=extra, add_zero_attn=extra).train(training)
    ours = usp.MultiheadAttention.from_torch(theirs)
    x = torch.randn(5, 2, 8)
    exact = theirs(x, x, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, results = theirs(x, x, x), ours(x, x, x)
    for result, wanted, true in zip(results, expected, exact, strict=True):
        assert result.dtype == wanted.dtype == torch.bfloat16
        torch.testing.assert_close(result.float(), true, rtol=0.05, atol=0.05)
    results[0].float().square().mean().backward()
    assert ours.in_proj_weight.grad.dtype == torch.float32


def test_weights_beyond_all_memory_are_refused(monkeypatch) -> None:
    module, x = usp.MultiheadAttention(8, 2), torch.randn(5, 1, 8)
    monkeypatch.setattr(attention_weights, "MAX_BYTES", 2 * 5 * 5 * 4 - 1)
    with pytest.raises(NotImplementedError, match=r"200 bytes .* 199: pass need_weights=False"):
        module(x, x, x)
    module(x, x, x, need_weights=False)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 3), (0, 0)])
def test_no_tokens(batch_first, batch, length) -> None:
    module = usp.MultiheadAttention(8, 2, batch_first=batch_first, add_bias_kv=True)
    shape = (batch, length, 8) if batch_first else (length, batch, 8)
    x = torch.randn(shape, requires_grad=True)
    out, weights = module(x, x, x, attn_mask=torch.zeros(batch * 2, length, length))
    assert out.shape == shape and weights.shape == (batch, length, length + 1)
    out.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_whole(dropout, masked) -> None:
    module = usp.MultiheadAttention(8, 2, dropout=dropout, batch_first=True, dtype=F64)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, 8, dtype=F64, requires_grad=True)
    options = {"need_weights": False}
    if masked:
        options["attn_mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
        options["key_padding_mask"] = torch.arange(5).expand(2, 5) >= 4
    results = []
    for call in (module, compiled):
        torch.manual_seed(5)
        out = call(x, x, x, **options)[0]
        results.append((out, *torch.autograd.grad(out, x, torch.cos(out.detach() * 9))))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-9, atol=1e-9)
