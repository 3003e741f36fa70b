"""What a region refuses, what it leaves alone, and who takes it along: checkpoints and graphs."""

from __future__ import annotations

import re
import threading
from typing import Any

import compiling
import pool as workers
import pytest
import torch
import torch.nn.functional as F
from integration_models import F64, random
from pool import RemoteError
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import usp

pytestmark = pytest.mark.library

EIGHT = {"rtol": 1e-8, "atol": 1e-8}
LENGTH, TEXT = 13, 5


def spread_of(mesh: tuple[int, int], length: int = LENGTH, layout: Any = "zigzag") -> usp.Spread:
    return usp.Spread(workers.mesh(*mesh), layout, length)


def qkv(seed: int, length: int = LENGTH) -> list[Tensor]:
    return [random(2, 3, length, 4, seed=seed + n) for n in range(3)]


class Block(nn.Module):
    """As in timm."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.qkv, self.proj = nn.Linear(12, 36, dtype=F64), nn.Linear(12, 12, dtype=F64)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.drop(self.proj(out.transpose(1, 2).flatten(2)))


# Refusals ----------------------------------------------------------------------------------------


def _cross_attention(case: str) -> None:
    spread = spread_of((1, 2))
    q, k, v = (spread.shard(x, -2) for x in qkv(0))
    text = random(2, 3, TEXT, 4, seed=7)
    with usp.spread_attention(spread):
        if case == "keys":
            F.scaled_dot_product_attention(q, text, text)
        elif case == "queries":
            F.scaled_dot_product_attention(text, k, v)
        elif case == "one rank alone":  # which holds 7 tokens, and the other 6
            six = random(2, 3, 6, 4, seed=7)
            F.scaled_dot_product_attention(q, six, six)
        elif case == "square":
            mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()
            F.scaled_dot_product_attention(q, k, v, mask)
        elif case == "both":
            F.scaled_dot_product_attention(q, k, v, torch.ones(1, LENGTH).bool(), 0.0, True)
        elif case == "heads":
            F.scaled_dot_product_attention(q[:, :2], k, v)
        else:
            F.scaled_dot_product_attention(q[:, :2], k, v, enable_gqa=True)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("keys", r"{held} queries and 5 keys .* holds {held} of 13 tokens.*whole="),
        ("queries", r"5 queries and {held} keys .* holds {held} of 13 tokens"),
        ("one rank alone", r"7 queries and 6 keys .* holds 7 of 13 tokens"),
        ("square", r"attn_mask is \({held}, {held}\) .* holds {held} of 13 tokens.*square"),
        ("both", "exclude each other"),
        ("heads", "query has 2 heads, key 3, value 3: pass enable_gqa=True"),
        ("gqa", "2 is no multiple of both"),
    ],
)
def test_what_cannot_be_told_is_refused_on_every_rank(pool, case, message) -> None:
    for rank, error in enumerate(pool.outcomes(_cross_attention, case, ranks=2)):
        assert isinstance(error, RemoteError) and error.kind == "ValueError", error
        wanted = message.format(held=(7, 6)[rank])
        if case == "one rank alone" and rank == 1:
            wanted = "rank 0 of the mesh refused: .*" + wanted
        with pytest.raises(RemoteError, match=wanted):
            raise error


class Mixture(nn.Module):
    """What a region would not be right about, one at a time."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.attention = kind, nn.MultiheadAttention(12, 3, batch_first=True, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "module":
            return self.attention(x, x, x)[0]
        if self.kind == "positions":
            return x + torch.arange(0, x.shape[1])[:, None]
        scores = x @ x.mT
        return {"function": F.softmax, "method": Tensor.softmax}[self.kind](scores, -1) @ x


def _refused(kind: str) -> list[str]:
    spread, told = spread_of((2, 1)), []
    x = spread.shard(random(2, LENGTH, 12, seed=1))
    with usp.spread_attention(spread):
        try:
            Mixture(kind)(x)
        except NotImplementedError as refusal:
            told.append(str(refusal))
    with usp.spread_attention(usp.Spread(None, seq_len=LENGTH)):
        Mixture(kind)(random(2, LENGTH, 12, seed=1))
    if kind != "module":
        with usp.spread_attention(spread, watch=False):
            Mixture(kind)(x)
    return told


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("module", "multi_head_attention_forward .*: replace it first"),
        ("function", "softmax over 7 x 7 scores .* 7 tokens of this rank, of 13"),
        ("method", "softmax over 7 x 7"),
        ("positions", "arange of 7 numbers looks like positions .* of 13, .* begin at 0"),
    ],
)
def test_what_is_no_call_of_torchs_function_is_refused(pool, kind, message) -> None:
    (told,), _ = pool.run(_refused, kind, ranks=2)
    assert re.search(message, told), told


def _ours_inside() -> None:
    """What usp does in a region is no business of its."""
    spread = spread_of((1, 2))
    module = usp.MultiheadAttention(12, 3, batch_first=True, dtype=F64, dropout=0.1)
    module.placement = usp.MultiheadAttention(12, 3, **spread.options).placement
    x = spread.shard(random(2, LENGTH, 12, seed=1))
    with usp.spread_attention(spread) as region:
        module(x, x, x, need_weights=True)
        spread.unshard(x)
        spread.roll(x, 1)
        q = x.unflatten(2, (3, 4))
        usp.long_context_attention(q, q, q, **spread.options, backend="reference")
    assert region.answered == 0


def test_our_own_functions_pass(pool) -> None:
    pool.run(_ours_inside, ranks=2)


# Left alone --------------------------------------------------------------------------------------


def _text() -> list[Tensor]:
    """Image tokens look at a whole text, and the text at itself, in one region."""
    spread = spread_of((2, 2))
    leaves = [x.requires_grad_() for x in (*qkv(0), *qkv(5, TEXT))]
    q, k, v, *text = leaves
    q, k, v = (spread.shard(x, -2) for x in (q, k, v))
    with usp.spread_attention(spread, whole=(TEXT,)) as region:
        own = F.scaled_dot_product_attention(*text, is_causal=True)
        out = F.scaled_dot_product_attention(q, own, own, random(1, TEXT, seed=2), scale=0.3)
        out = out + F.scaled_dot_product_attention(q, k, v)
        F.scaled_dot_product_attention(q, own, own, dropout_p=0.5)
    assert region.answered == 4
    whole = spread.unshard(out, -2)
    gradients = torch.autograd.grad(whole, leaves, random(*whole.shape, seed=3) / 4)
    return [whole.detach(), *gradients, torch.randint(2**60, ())]


def test_a_text_that_all_hold_whole(pool) -> None:
    leaves = [x.requires_grad_() for x in (*qkv(0), *qkv(5, TEXT))]
    own = F.scaled_dot_product_attention(*leaves[3:], is_causal=True)
    out = F.scaled_dot_product_attention(leaves[0], own, own, random(1, TEXT, seed=2), scale=0.3)
    out = out + F.scaled_dot_product_attention(*leaves[:3])
    wanted = torch.autograd.grad(out, leaves, random(*out.shape, seed=3))
    found = pool.run(_text, ranks=4)
    for whole, *_, after in found:
        torch.testing.assert_close(whole, out.detach(), **EIGHT)
        assert after == found[0][-1]  # generators are in step
    for parts, gradient in zip(zip(*(f[1:-1] for f in found), strict=True), wanted, strict=True):
        torch.testing.assert_close(sum(parts), gradient, **EIGHT)


def _ambiguous(whole: tuple[int, ...]) -> None:
    usp.spread_attention(spread_of((1, 2)), whole=whole)


@pytest.mark.parametrize("whole", [(6,), (TEXT, 7), (LENGTH,)])
def test_lengths_that_could_be_confused_are_refused(pool, whole) -> None:
    with pytest.raises(RemoteError, match=r"names \[.*ranks hold \(7, 6\) of the 13"):
        pool.run(_ambiguous, whole, ranks=2)


def _only_here() -> None:
    spread, (q, k, v) = spread_of((1, 2)), qkv(0)
    local = F.scaled_dot_product_attention(q, k, v)
    seen = []

    def elsewhere() -> None:
        seen.append(F.scaled_dot_product_attention(q, k, v))

    region = usp.spread_attention(spread)
    with region:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    seen.append(F.scaled_dot_product_attention(q, k, v))
    with usp.spread_attention(spread), usp.spread_attention(usp.Spread(None, seq_len=4)):
        seen.append(F.scaled_dot_product_attention(q, k, v))  # the inner one's, on one device
    assert all(torch.equal(out, local) for out in seen) and region.answered == 0


def test_calls_elsewhere_are_torchs(pool) -> None:
    pool.run(_only_here, ranks=2)


# Random numbers ----------------------------------------------------------------------------------


def _dropped(mesh: tuple[int, int]) -> list[Tensor]:
    torch.manual_seed(5)
    spread = spread_of(mesh)
    q, k, v = (spread.shard(x, -2) for x in qkv(0))
    with usp.spread_attention(spread):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
        ones = F.scaled_dot_product_attention(q, k, torch.ones_like(v), dropout_p=0.4)
        kept = F.dropout(torch.ones(2, spread.local_seq_len, 50)) > 0
        nn.Dropout(0.5).eval()(kept.double())
    assert not torch.allclose(ones, torch.ones_like(ones))  # weights are dropped
    return [spread.unshard(out, -2), kept[:, :6].double(), torch.randint(2**60, ())]


def test_dropout_keeps_the_ranks_in_step(pool) -> None:
    ((alone, *_),) = pool.run(_dropped, (1, 1), ranks=1)
    (out, kept, after), (_, other, after_other) = pool.run(_dropped, (1, 2), ranks=2)
    torch.testing.assert_close(out, alone, **EIGHT)
    assert after == after_other and not torch.equal(kept, other)
    assert 0.3 < kept.mean() < 0.7


# Computed again ----------------------------------------------------------------------------------


def _checkpointed(reentrant: bool, inside: bool) -> dict[str, Tensor]:
    spread, block = spread_of((1, 2)), Block()
    x = random(2, LENGTH, 12, seed=1).requires_grad_()

    def attend(x: Tensor) -> Tensor:
        with usp.spread_attention(spread):
            return block(x)

    if inside:
        y = checkpoint(attend, spread.shard(x), use_reentrant=reentrant)
    else:
        with usp.spread_attention(spread):
            y = checkpoint(block, spread.shard(x), use_reentrant=reentrant)
    try:
        (y * spread.shard(random(2, LENGTH, 12, seed=2))).sum().backward()
    except CheckpointError as error:
        raise RuntimeError(str(error)) from None
    return {"x": x.grad} | {name: p.grad for name, p in block.named_parameters()}


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_region_is_right(pool, reentrant) -> None:
    block, x = Block(), random(2, LENGTH, 12, seed=1).requires_grad_()
    (block(x) * random(2, LENGTH, 12, seed=2)).sum().backward()
    wanted = {"x": x.grad} | {name: p.grad for name, p in block.named_parameters()}
    found = pool.run(_checkpointed, reentrant, True, ranks=2)
    for name, gradient in wanted.items():
        torch.testing.assert_close(sum(f[name] for f in found), gradient, **EIGHT)


@pytest.mark.parametrize(
    ("reentrant", "message"),
    [(True, "enter it inside of what"), (False, "different number of tensors")],
)
def test_a_checkpoint_in_the_region_is_never_wrong(pool, reentrant, message) -> None:
    with pytest.raises(RemoteError, match=message):
        pool.run(_checkpointed, reentrant, False, ranks=2)


# Graphs ------------------------------------------------------------------------------------------


def _compiled(mesh: tuple[int, int]) -> list[float]:
    """Errors of one compiled block: in regions of three lengths, and outside of all."""
    errors, block = [], Block()
    with compiling.afresh():
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        for length, layout in ((13, "zigzag"), (13, "contiguous"), (8, "zigzag"), (13, "zigzag")):
            spread = spread_of(mesh, length, layout)
            whole = [random(2, length, 12, seed=1).requires_grad_() for _ in range(2)]
            wanted = block(whole[0])
            with usp.spread_attention(spread):
                out = compiled(spread.shard(whole[1]))
            errors.append((spread.unshard(out) - wanted).abs().max().item())
            cotangent = random(*wanted.shape, seed=2)
            wanted.backward(cotangent)
            parameters = list(block.parameters())
            sums = [p.grad.clone() for p in parameters]
            block.zero_grad()
            out.backward(spread.shard(cotangent))
            usp.all_reduce_gradients(block, spread.mesh)
            gaps = [(p.grad - s).abs().max().item() for p, s in zip(parameters, sums, strict=True)]
            errors.append(max(gaps))
            block.zero_grad()
        errors.append((compiled(whole[0]) - wanted).abs().max().item())
    return errors


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)], ids=str)
def test_a_graph_knows_which_region_it_is_in(pool, mesh) -> None:
    for errors in pool.run(_compiled, mesh, ranks=mesh[0] * mesh[1]):
        assert len(errors) == 9 and max(errors) < 1e-9, errors
