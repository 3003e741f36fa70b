"""The oracle, its dropout and the byte counter, against torch and known answers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from usp.testing import WireBytes, dense_attention, dropout_multiplier, philox, visible_keys


def inputs(sq: int = 7, sk: int = 11, heads: int = 6, kv_heads: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, sq, heads, 5), (2, sk, kv_heads, 5), (2, sk, kv_heads, 3)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    return out.transpose(1, 2)


def assert_same_gradients(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, cotangent, retain_graph=True),
        torch.autograd.grad(theirs, leaves, cotangent, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_plain_attention_is_torchs() -> None:
    leaves = inputs()
    assert_same_gradients(dense_attention(*leaves)[0], sdpa(*leaves), leaves)


def test_causal_is_torchs_also_when_lengths_differ() -> None:
    leaves = inputs()
    ours, _ = dense_attention(*leaves, causal=True, softmax_scale=0.3)
    assert_same_gradients(ours, sdpa(*leaves, is_causal=True, scale=0.3), leaves)


def test_bias_padding_and_alibi_are_torchs_additive_mask() -> None:
    leaves = inputs()
    bias = torch.randn(2, 1, 7, 11, dtype=torch.float64, requires_grad=True)
    padding = torch.rand(2, 11) < 0.3
    slopes = torch.rand(6, dtype=torch.float64)
    distance = (torch.arange(7)[:, None] - torch.arange(11)).abs()
    mask = bias - slopes[:, None, None] * distance
    mask = mask.masked_fill(padding[:, None, None], float("-inf"))
    ours, _ = dense_attention(
        *leaves, attn_bias=bias, key_padding_mask=padding, alibi_slopes=slopes
    )
    assert_same_gradients(ours, sdpa(*leaves, attn_mask=mask), [*leaves, bias])


def test_softcap_and_lse_by_hand() -> None:
    q, k, v = leaves = inputs(heads=3)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 5**-0.5
    scores = 1.5 * torch.tanh(scores / 1.5)
    out, lse = dense_attention(q, k, v, softcap=1.5)
    assert_same_gradients(lse, torch.logsumexp(scores, -1), leaves[:2])
    assert_same_gradients(out, torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v), leaves)


def test_who_sees_whom() -> None:
    def rows(*args: int, **options: object) -> list[str]:
        return ["".join(".x"[seen] for seen in row) for row in visible_keys(*args, **options)]

    assert rows(3, 4) == ["xxxx"] * 3
    assert rows(3, 4, causal=True) == ["x...", "xx..", "xxx."]
    assert rows(4, 4, window_size=(1, 0)) == ["x...", "xx..", ".xx.", "..xx"]
    assert rows(3, 4, window_size=(None, 1)) == ["xx..", "xxx.", "xxxx"]
    assert rows(4, 4, causal=True, prefix_len=2) == ["xx..", "xx..", "xxx.", "xxxx"]
    assert rows(4, 4, causal=True, prefix_len=3, window_size=(1, 1)) == [
        "xx..",
        "xxx.",
        ".xx.",
        "..xx",
    ]
    assert rows(4, 4, cu_seqlens=(0, 1, 1, 4)) == ["x...", ".xxx", ".xxx", ".xxx"]
    assert rows(4, 4, causal=True, cu_seqlens=(0, 2, 4)) == ["x...", "xx..", "..x.", "..xx"]


@pytest.mark.parametrize("sk", [0, 11])
def test_rows_that_see_nothing(sk: int) -> None:
    leaves = inputs(sk=sk)
    padding = torch.ones(2, sk, dtype=torch.bool)
    padding[1] = False
    out, lse = dense_attention(*leaves, key_padding_mask=padding)
    assert (out[0] == 0).all() and (lse[0] == float("-inf")).all()
    gradients = torch.autograd.grad((out * torch.randn_like(out)).sum() + lse[1].sum(), leaves)
    for gradient in gradients:
        assert gradient.isfinite().all() and (gradient[0] == 0).all()
    q_gradient = torch.autograd.grad(dense_attention(*leaves)[0].sum(), leaves)[0]
    assert q_gradient.isfinite().all()


def test_minus_infinity_in_the_bias_hides_and_huge_scores_stay_finite() -> None:
    leaves = inputs()
    bias = torch.zeros(1, 1, 7, 11, dtype=torch.float64)
    bias[..., 3] = 2000.0
    bias[..., 0, :] = float("-inf")
    bias.requires_grad_()
    out, lse = dense_attention(*leaves, attn_bias=bias)
    torch.testing.assert_close(out[:, 1:, ::2], leaves[2][:, 3:4].expand(-1, 6, -1, -1))
    gradients = torch.autograd.grad((out * torch.randn_like(out)).sum(), [*leaves, bias])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (lse[:, :, 0] == float("-inf")).all() and (out[:, 0] == 0).all()


def test_gradients_by_finite_differences() -> None:
    bias = torch.randn(2, 1, 1, 11, dtype=torch.float64, requires_grad=True)
    keep = dropout_multiplier(0.3, 5, 2, 6, 7, 11)

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        options = {"window_size": (3, 2), "softcap": 2.0, "dropout_keep": keep}
        return dense_attention(q, k, v, attn_bias=bias, **options)

    assert torch.autograd.gradcheck(attention, [*inputs(), bias])


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple, key: tuple, words: tuple) -> None:
    """The vectors that Random123 publishes for philox4x32-10."""
    assert tuple(int(word) for word in philox(counter, key)) == words


def test_dropout_multiplier_reads_the_word_of_each_key() -> None:
    seed = 0x1234567890ABCDEF
    kept = dropout_multiplier(0.4, seed, 2, 3, 4, 9)
    assert kept.shape == (2, 3, 4, 9)
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 3, 8), (0, 1, 2, 5), (1, 0, 0, 7)]:
        word = philox((j >> 2, i, b * 3 + h, 0), (0x90ABCDEF, 0x12345678))[j & 3]
        assert kept[b, h, i, j] == (1 / 0.6 if int(word) >= int(0.4 * 2**32) else 0.0)
    large = dropout_multiplier(0.4, 1, 1, 4, 128, 128)
    assert abs((large > 0).double().mean().item() - 0.6) < 0.01
    assert set(dropout_multiplier(0.0, 1, 1, 1, 4, 4).unique().tolist()) == {1.0}


def wire_of(operation: str) -> tuple[int, dict[str, int]]:
    """Bytes of one operation with 24 float32 (96 bytes) in a world of 3."""
    rank = dist.get_rank()
    x = torch.arange(24.0)
    with WireBytes() as wire:
        if operation == "send":
            received = torch.empty(24)
            right, left = (rank + 1) % 3, (rank - 1) % 3
            works = dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, x, right), dist.P2POp(dist.irecv, received, left)]
            )
            for work in works:
                work.wait()
        elif operation == "all_to_all_uneven":
            # everybody gives rank r a piece of sizes[r] numbers
            sizes = [8, 12, 4]
            out = torch.empty(sizes[rank] * 3)
            dist.all_to_all_single(out, x, [sizes[rank]] * 3, sizes)
        elif operation == "all_to_all_even":
            dist.all_to_all_single(torch.empty(24), x)
        elif operation == "all_gather":
            dist.all_gather([torch.empty(24) for _ in range(3)], x)
        elif operation == "all_gather_into_tensor":
            dist.all_gather_into_tensor(torch.empty(72), x)
        elif operation == "reduce_scatter":
            dist.reduce_scatter_tensor(torch.empty(8), x)
        elif operation == "all_reduce":
            dist.all_reduce(x)
        elif operation == "broadcast":
            dist.broadcast(x, src=1)
        elif operation == "barrier":
            dist.barrier()
    return wire.sent, dict(wire.calls)


def test_the_dispatch_mode_sees_every_operation(pool) -> None:
    expected = {
        "send": [96, 96, 96],
        "all_to_all_uneven": [64, 48, 80],
        "all_to_all_even": [64, 64, 64],
        "all_gather": [192, 192, 192],
        "all_gather_into_tensor": [192, 192, 192],
        "reduce_scatter": [64, 64, 64],
        "all_reduce": [128, 128, 128],
        "broadcast": [0, 192, 0],
        "barrier": [0, 0, 0],
    }
    for operation, sent in expected.items():
        results = pool.run(wire_of, operation, ranks=3)
        assert [bytes_sent for bytes_sent, _ in results] == sent, operation
        assert all(sum(calls.values()) >= 1 for _, calls in results), operation


def functional_all_reduce() -> None:
    import torch.distributed._functional_collectives as functional

    with WireBytes():
        functional.all_reduce(torch.ones(3), "sum", dist.group.WORLD)


def test_what_it_cannot_count_it_refuses(pool) -> None:
    outcomes = pool.outcomes(functional_all_reduce, ranks=2)
    assert [outcome.kind for outcome in outcomes] == ["NotImplementedError"] * 2
