"""flex_attention in a region: the whole sequence, its block mask as bands, in fp64."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any
from unittest import mock

import doors
import pool as workers
import pytest
import torch
import torch.nn.functional as F
from integration_models import F64, random
from pool import RemoteError
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

import usp

pytestmark = pytest.mark.library

LENGTH = 13
NUMBERS = torch.tensor([[0] * 5 + [1] * 8, [0] * 9 + [1] * 4])  # of each token's document
Seen = Callable[[Any, Any, Tensor, Tensor], Tensor]


def causal(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def window(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (q - k < 4) | (k < 2)


def documents(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
    return (NUMBERS[b, q] == NUMBERS[b, k]) & (q >= k)


MASKS: dict[str, Seen | None] = {
    "none": None,
    "causal": causal,
    "window": window,
    "documents": documents,
}


def block_mask(name: str, length: int = LENGTH) -> Any:
    seen = MASKS[name]
    samples = 2 if name == "documents" else None
    return seen and create_block_mask(seen, samples, None, length, length, device="cpu")


def inputs(requires_grad: bool = True) -> list[Tensor]:
    """Queries of six heads, keys and values of two."""
    sizes = [(6, 4), (2, 4), (2, 5)]
    return [
        random(2, heads, LENGTH, dim, seed=n).requires_grad_(requires_grad)
        for n, (heads, dim) in enumerate(sizes)
    ]


def dense(name: str) -> Tensor:
    """(2, 1, queries, keys) bool."""
    seen, places = MASKS[name], torch.arange(LENGTH)
    if seen is None:
        return torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    samples = [seen(torch.tensor(n), None, places[:, None], places) for n in range(2)]
    return torch.stack([x.expand(LENGTH, LENGTH) for x in samples])[:, None]


def expected(name: str) -> list[Tensor]:
    """Out, LSE and every gradient on one device."""
    leaves = inputs()
    q, k, v = leaves[0], *(x.repeat_interleave(3, 1) for x in leaves[1:])
    scores = (q @ k.mT * 0.7).masked_fill(~dense(name), -torch.inf)
    found = F.softmax(scores, -1) @ v, scores.logsumexp(-1)
    cotangents = [random(*x.shape, seed=9) for x in found]
    return [*(x.detach() for x in found), *torch.autograd.grad(found, leaves, cotangents)]


def _spread(name: str, mesh: tuple[int, int], layout: str) -> list[Tensor]:
    spread = usp.Spread(workers.mesh(*mesh), layout, LENGTH)
    leaves = inputs()
    local = [spread.shard(x, -2) for x in leaves]
    options = {"block_mask": block_mask(name), "scale": 0.7, "enable_gqa": True}
    with usp.spread_attention(spread) as region:
        out, aux = flex.flex_attention(*local, **options, return_aux=AuxRequest(lse=True))
        alone = flex.flex_attention(*local, **options)
        pair = flex.flex_attention(*local, **options, return_lse=True)
    assert region.answered == 3
    assert torch.equal(alone, out) and torch.equal(pair[1], aux.lse)
    whole = [spread.unshard(out, -2), spread.unshard(aux.lse, -1)]
    size = spread.mesh.size  # all ranks compute this loss alike
    cotangents = [random(*x.shape, seed=9) / size for x in whole]
    return [*(x.detach() for x in whole), *torch.autograd.grad(whole, leaves, cotangents)]


@pytest.mark.parametrize(("mesh", "layout"), [((1, 2), "zigzag"), ((2, 1), "contiguous")])
@pytest.mark.parametrize("name", MASKS)
def test_a_call_means_the_whole_sequence(pool, name, mesh, layout) -> None:
    wanted, found = expected(name), pool.run(_spread, name, mesh, layout, ranks=2)
    for n, right in enumerate(wanted):
        whole = found[0][n] if n < 2 else found[0][n] + found[1][n]  # each has a part
        torch.testing.assert_close(whole, right, rtol=1e-10, atol=1e-10)


# In a trunk ---------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36, dtype=F64), nn.Linear(12, 12, dtype=F64)
        self.name = name

    def forward(self, x: Tensor, seen: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        if seen.shape[-1] == q.shape[-2]:  # the whole: torch's would compile itself for fp32 alone
            out = F.scaled_dot_product_attention(q, k, v, dense(self.name))
        else:
            out = flex.flex_attention(q, k, v, block_mask=seen)
        return x + self.out(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """A block mask of the whole, made once in a forward, for all layers."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.layers = name, nn.ModuleList(Layer(name) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        seen = block_mask(self.name)
        for layer in self.layers:
            x = layer(x, seen)
        return x


def _in_trunk(name: str) -> dict[str, float]:
    mesh, x = workers.mesh(1, 2), {"x": random(2, LENGTH, 12, seed=3)}
    model = doors.randomize(Model(name))
    return doors.compared(model, x, mesh, lambda m: usp.parallelize(m, mesh, "layers"))


@pytest.mark.parametrize("name", ["window", "documents"])
def test_in_a_trunk(pool, name) -> None:
    for wrong in pool.run(_in_trunk, name, ranks=2):
        assert wrong == {}


class Unmasked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        return flex.flex_attention(x, x, x)[:, 0]


def _of_documents(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, spread=usp.Spread(None, cu_seqlens=(0, 4, LENGTH)))


def test_documents_on_one_device_are_apart_in_another_process_too() -> None:
    """Where nobody calls parallelize, but a model is unpickled on which it was called."""
    model, x = nn.Sequential(Unmasked()), random(1, LENGTH, 12, seed=3)
    parts = x.split((4, LENGTH - 4), 1)
    wanted = torch.cat([F.scaled_dot_product_attention(part, part, part) for part in parts], 1)
    usp.parallelize(model, None, "", outputs="local")
    torch.testing.assert_close(_of_documents(model, x), wanted)
    with multiprocessing.get_context("spawn").Pool(1) as another:
        torch.testing.assert_close(another.apply(_of_documents, (model, x)), wanted)


# Refusals -----------------------------------------------------------------------------------------


def of_heads(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
    return q >= k + h


def scattered(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
    return (q * k) % 5 == 1


def steeper(score: Tensor, b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
    return score * 2


def _refused(case: str) -> None:
    length = 200 if case == "scattered" else LENGTH
    spread = usp.Spread(workers.mesh(1, 2), "zigzag", length)
    q = spread.shard(random(2, 3, length, 4, seed=1), -2)
    held = q.shape[-2]
    made = {
        "score_mod": {"score_mod": steeper},
        "heads": {"block_mask": create_block_mask(of_heads, None, 3, length, length, "cpu")},
        "head": {"block_mask": create_block_mask(of_heads, None, 1, length, length, "cpu")},
        "scattered": {"block_mask": create_block_mask(scattered, 1, 1, length, length, "cpu")},
        "local": {"block_mask": create_block_mask(causal, None, None, held, held, "cpu")},
        "samples": {"block_mask": create_block_mask(causal, 3, None, length, length, "cpu")},
        "max_scores": {"return_aux": AuxRequest(max_scores=True)},
    }
    with usp.spread_attention(spread):
        flex.flex_attention(q, q[:, :, :3] if case == "keys" else q, q, **made.get(case, {}))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("score_mod", "is given score_mod steeper, .* softcap, alibi_slopes and attn_bias"),
        ("heads", "block_mask is of 3 heads"),
        ("head", "mask_mod of_heads of block_mask: mask_mod uses its head"),
        ("scattered", "mask_mod scattered of block_mask: .* bands"),
        ("local", r"of [67] queries and [67] keys, where this rank holds [67] of 13 tokens"),
        ("samples", "block_mask is of 3 samples, and the batch has 2"),
        ("max_scores", "max_scores"),
        ("keys", "7 queries and 3 keys"),
    ],
)
def test_what_no_bands_say_is_refused_on_every_rank(pool, case, message) -> None:
    for error in pool.outcomes(_refused, case, ranks=2):
        assert isinstance(error, RemoteError), error
        assert error.kind in ("ValueError", "TypeError", "NotImplementedError")
        assert error.kind != "Hang"
    with pytest.raises(RemoteError, match=message):
        pool.run(_refused, case, ranks=2)


# Elsewhere ----------------------------------------------------------------------------------------


def test_elsewhere_it_is_torchs() -> None:
    """Outside of regions, in one of one device, and compiled, with what torch tells of it."""
    import inspect

    q = random(1, 2, LENGTH, 4, seed=1)
    wanted = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    with usp.spread_attention(usp.Spread(None, seq_len=LENGTH)):
        pass
    names = list(inspect.signature(flex.flex_attention).parameters)
    assert names[:5] == ["query", "key", "value", "score_mod", "block_mask"]
    assert flex.flex_attention.__name__ == "flex_attention" and flex.flex_attention.__doc__
    compiled = torch.compile(flex.flex_attention, backend="eager", fullgraph=True)
    with mock.patch.object(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True):
        for function in (flex.flex_attention, compiled):
            found = function(q, q, q, block_mask=block_mask("causal"))
            torch.testing.assert_close(found, wanted)
            with usp.spread_attention(usp.Spread(None, seq_len=LENGTH)):
                torch.testing.assert_close(function(q, q, q, None, block_mask("causal")), wanted)
    with pytest.raises(ValueError, match="block_mask was created for"):
        flex.flex_attention(q[:, :, :7], q, q, block_mask=block_mask("causal"))


def _compiled() -> float:
    """A function that calls it, compiled, in a region."""
    spread, whole = usp.Spread(workers.mesh(1, 2), "zigzag", LENGTH), inputs(False)
    local, seen = [spread.shard(x, -2) for x in whole], block_mask("window")
    compiled = torch.compile(flex.flex_attention, backend="eager")
    with usp.spread_attention(spread):
        out = compiled(*local, block_mask=seen, scale=0.7, enable_gqa=True)
    return float((out - spread.shard(expected("window")[0], -2)).abs().max())


def test_compiled_in_a_region(pool) -> None:
    assert max(pool.run(_compiled, ranks=2)) < 1e-10
