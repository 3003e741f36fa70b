"""LongContextAttention: the function as a module; copies, validation, modes, partial gradients."""

from __future__ import annotations

import copy
import pickle
from itertools import product

import pool as worker
import pytest
import torch
import torch.distributed as dist
from cases import Case, local, shards, whole
from judge import assert_close, join, oracle
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import usp
from usp.testing import WireBytes, dense_attention, dropout_multiplier

SMALL = Case(ulysses=2, ring=2, seq_len=13, heads=3, kv_heads=3, causal=True, layout="zigzag")


def qkv(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 9, 4, 5, generator=random, dtype=dtype) for _ in range(3)]


def test_it_is_the_function_with_its_options_kept() -> None:
    options = {"causal": True, "window_size": (5, None), "softmax_scale": 0.2, "softcap": 3.0}
    slopes, bias = torch.rand(4), torch.randn(1, 4, 9, 9)
    padding = torch.rand(2, 9) < 0.3
    attention = usp.LongContextAttention(**options, alibi_slopes=slopes, return_lse=True)
    out, lse = attention(*qkv(), key_padding_mask=padding, attn_bias=bias)
    expected = dense_attention(
        *qkv(), **options, alibi_slopes=slopes, key_padding_mask=padding, attn_bias=bias
    )
    torch.testing.assert_close((out, lse), expected, rtol=1e-9, atol=1e-9)


def test_it_holds_no_parameters_and_no_state() -> None:
    attention = usp.LongContextAttention(alibi_slopes=torch.rand(4))
    assert list(attention.parameters()) == [] and attention.state_dict() == {}
    assert attention.to(torch.float64).alibi_slopes.dtype == torch.float64


def test_what_a_call_passes_wins_over_the_constructor() -> None:
    attention = usp.LongContextAttention(
        causal=True, cu_seqlens=(0, 9), alibi_slopes=torch.zeros(4), seq_len=9
    )
    slopes = torch.rand(4)
    out = attention(*qkv(), cu_seqlens=(0, 2, 9), alibi_slopes=slopes)
    expected, _ = dense_attention(*qkv(), causal=True, cu_seqlens=(0, 2, 9), alibi_slopes=slopes)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"9.*8|8.*9"):
        attention(*qkv(), seq_len=8)


def test_dropout_is_for_training() -> None:
    attention = usp.LongContextAttention(dropout_p=0.5)
    torch.manual_seed(3)
    seed = int(torch.randint(2**62, ()))
    torch.manual_seed(3)
    dropped, again = attention(*qkv()), attention(*qkv())
    keep = dropout_multiplier(0.5, seed, 2, 4, 9, 9)
    expected, _ = dense_attention(*qkv(), dropout_keep=keep)
    torch.testing.assert_close(dropped, expected, rtol=1e-9, atol=1e-9)
    assert not torch.equal(dropped, again), "every call draws anew"
    expected, _ = dense_attention(*qkv())
    torch.testing.assert_close(attention.eval()(*qkv()), expected, rtol=1e-9, atol=1e-9)


def test_checkpointing_replays_dropout() -> None:
    attention = usp.LongContextAttention(dropout_p=0.5, causal=True)
    results = []
    for run in (attention, lambda *x: checkpoint(attention, *x, use_reentrant=False)):
        torch.manual_seed(5)
        leaves = [x.requires_grad_() for x in qkv()]
        out = run(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, qkv(1)[0])))
    for plain, replayed in zip(*results, strict=True):
        assert torch.equal(plain, replayed)


def test_autocast_is_torchs() -> None:
    """As for torch's own attention: computed and returned in autocast's dtype."""
    leaves = [x.requires_grad_() for x in qkv(dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        out = usp.LongContextAttention()(*leaves)
    assert out.dtype == torch.bfloat16
    rounded = [x.detach().bfloat16() for x in leaves]
    torch.testing.assert_close(
        out.double(), dense_attention(*rounded)[0], rtol=1e-2, atol=1e-2, check_dtype=False
    )
    gradients = torch.autograd.grad(out, leaves, torch.randn_like(out))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    leaves = [x.requires_grad_() for x in qkv()]
    out = usp.LongContextAttention()(*leaves)
    (dq,) = torch.autograd.grad(out, leaves[0], qkv(1)[0], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dq.square().sum(), leaves)


def test_validate_knows_three_words() -> None:
    with pytest.raises(ValueError, match=r"first, always, never.*sometimes"):
        usp.LongContextAttention(validate="sometimes")


def test_it_prints_what_matters() -> None:
    shown = repr(usp.LongContextAttention(causal=True, layout="zigzag"))
    assert "causal=True" in shown and "layout='zigzag'" in shown and "softcap" not in shown


def module_of(case: Case, **options: object) -> usp.LongContextAttention:
    mesh = worker.mesh(case.ulysses, case.ring)
    return usp.LongContextAttention(
        mesh, causal=case.causal, layout=case.layout, seq_len=case.seq_len, **options
    )


def attended(attention: usp.LongContextAttention, case: Case) -> dict[str, Tensor]:
    t = local(case, dist.get_rank())
    leaves = [x.clone().requires_grad_() for x in (t.q, t.k, t.v)]
    out = attention(*leaves)
    gradients = torch.autograd.grad(out, leaves, t.dout)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))


def copied(case: Case) -> list[dict[str, Tensor]]:
    attention = module_of(case)
    copies = [copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))]
    first = attended(attention, case)
    return [first, *(attended(twin, case) for twin in [*copies, copy.deepcopy(attention)])]


def test_copies_and_pickles_attend(pool) -> None:
    expected = oracle(SMALL)
    for results in zip(*pool.run(copied, SMALL, ranks=4), strict=True):
        assert_close(SMALL, join(SMALL, list(results)), expected)


def collectives(case: Case, validate: str) -> list[int]:
    """How many operations each of three calls takes."""
    attention, counts = module_of(case, validate=validate), []
    for _ in range(3):
        with WireBytes() as wire, torch.no_grad():
            t = local(case, dist.get_rank())
            attention(t.q, t.k, t.v)
        counts.append(sum(wire.calls.values()))
    return counts


def test_when_ranks_compare_their_arguments(pool) -> None:
    """On CPUs "first" compares at every call: it costs no waiting for a device."""
    never = pool.run(collectives, SMALL, "never", ranks=4)
    first = pool.run(collectives, SMALL, "first", ranks=4)
    always = pool.run(collectives, SMALL, "always", ranks=4)
    for a, b, c in zip(never, first, always, strict=True):
        assert a[0] == a[1] == a[2]
        assert b == c and b[0] == b[1] == b[2] > a[0]


def some_gradients(case: Case, wanted: tuple[bool, ...]) -> dict[str, Tensor]:
    t = local(case, dist.get_rank())
    inputs = [x.requires_grad_(w) for x, w in zip((t.q, t.k, t.v, t.bias), wanted, strict=True)]
    out = module_of(case)(*inputs[:3], attn_bias=inputs[3])
    if not any(wanted):
        assert not out.requires_grad
        return {"out": out}
    out.backward(t.dout)
    names = ("dq", "dk", "dv", "dbias")
    assert [x.grad is not None for x in inputs] == list(wanted)
    return {"out": out.detach()} | {
        name: x.grad for name, x in zip(names, inputs, strict=True) if x.grad is not None
    }


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=4)), ids=str)
def test_only_the_gradients_that_are_wanted(pool, wanted: tuple[bool, ...]) -> None:
    case = Case(**{**vars(SMALL), "bias": "h"})
    everything = oracle(case)
    ours = join(case, pool.run(some_gradients, case, wanted, ranks=4))
    assert len(ours) == 1 + sum(wanted)
    assert_close(case, ours, {name: everything[name] for name in ours})


def trained(case: Case) -> list[float]:
    """Two projections around the module, three steps of SGD: the loss of each step."""
    torch.manual_seed(0)
    t, mine = whole(case), shards(case, case.seq_len)[dist.get_rank()]
    model = torch.nn.ModuleList(torch.nn.Linear(12, 12, dtype=torch.float64) for _ in range(2))
    attention = module_of(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, target = (whole.flatten(2)[:, mine] for whole in (t.q, t.v))
    losses = []
    for _ in range(3):
        h = model[0](x).unflatten(2, (3, 4))
        out = model[1](attention(h, h, h).flatten(2))
        loss = (out - target).square().sum() / case.seq_len
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item())
        optimizer.step()
    return losses


def test_a_model_trains_alike_on_one_rank_and_on_four(pool) -> None:
    """The loss is a mean over all tokens; sequence ranks add their parameters' gradients."""
    one = Case(**{**vars(SMALL), "ulysses": 1, "ring": 1})
    (alone,) = pool.run(trained, one, ranks=1)
    assert alone[0] > alone[1] > alone[2]
    for losses in pool.run(trained, SMALL, ranks=4):
        assert losses == pytest.approx(alone, rel=1e-10)
