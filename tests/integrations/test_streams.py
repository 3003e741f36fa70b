"""Trunks of two streams of tokens that attention joins, and of texts that all ranks hold whole."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import compiling
import doors
import pool as workers
import pytest
import torch
import torch.nn.functional as F
from integration_models import random
from pool import RemoteError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import usp
from usp.integrations import Entries, Joint
from usp.integrations._answer import Tokens, answer

WIDTH, HEADS = 12, 3


class Attention(nn.Module):
    """Of image tokens to themselves, with a text in front of them, or to a text alone."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.of_text = (nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))

    def forward(
        self,
        x: Tensor,
        text: Tensor | None = None,
        mask: Tensor | None = None,
        across: bool = False,
    ) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        if text is not None:
            other = self.of_text(text).unflatten(-1, (3, HEADS, -1)).unbind(2)
            parts = (parts[0], *other[1:]) if across else [
                torch.cat(pair, 1) for pair in zip(other, parts, strict=True)
            ]  # fmt: skip
        q, k, v = (part.transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.own, self.cross = Attention(), Attention(), Attention()
        self.mlp, self.of_text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(
        self,
        x: Tensor,
        text: Tensor | None,
        caption: Tensor,
        table: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor] | Tensor:
        x = x + self.cross(x, caption, across=True)
        if text is None:  # of both
            return x + self.mlp(torch.tanh(x + self.attn(x, mask=mask)))
        x, text = x + table[0], text + table[1]
        joined = self.attn(x, text, mask)
        text, x = text + joined[:, : text.shape[1]], x + joined[:, text.shape[1] :]
        x = x + self.own(x)
        return text + self.of_text(torch.tanh(text)), x + self.mlp(torch.tanh(x))


class Model(nn.Module):
    """Two blocks of two streams, and perhaps one of both as one sequence."""

    def __init__(self, single: bool, again: bool = False) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(Block() for _ in range(2))
        self.singles = nn.ModuleList(Block() for _ in range(single))
        self.again = again

    def forward(
        self, x: Tensor, text: Tensor, caption: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        table = torch.sin(x), torch.cos(text)
        length = text.shape[1]
        for block in self.pairs:
            text, x = self.call(block, x, text, caption, table, mask)
        for block in self.singles:
            x = torch.cat((text, x), 1)
            x = self.call(block, x, None, caption, table, mask)
            text, x = x[:, :length], x[:, length:]
        return text, x

    def call(self, block: nn.Module, *given: Any) -> Any:
        return checkpoint(block, *given, use_reentrant=False) if self.again else block(*given)


def boundary(each: bool) -> usp.Boundary:
    return usp.Boundary(
        "pairs",
        "*.attn",
        then=("singles",),
        whole={"*.cross": "text"},
        joint=Joint("text", alone="*.own", each=each),
        beside={"table": (Entries(1, "x"), Entries(1, "text"))} | ({"mask": -1} if each else {}),
    )


def inputs(length: int, text: int, padded: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = {"x": random(2, length, WIDTH, seed=1)}
    found |= {"text": random(2, text, WIDTH, seed=2), "caption": random(2, 3, WIDTH, seed=3)}
    if padded:
        mask = torch.ones(2, 1, 1, text + length, dtype=torch.bool)
        mask[1, ..., text - 1] = False
        found["mask"] = mask
    return found


# layout, whether each stream is cut by itself, image and text tokens
CASES = [
    ("contiguous", False, (11, 5)),
    ("zigzag", False, (5, 7)),
    ("striped", False, (6, 1)),
    ("contiguous", True, (11, 5)),
    ("zigzag", True, (5, 8)),
]


def _compared(mesh: tuple[int, int]) -> dict[str, float]:
    placed = None if mesh == (1, 1) else workers.mesh(*mesh)
    wrong: dict[str, float] = {}
    for number, (layout, each, shape) in enumerate(CASES):
        torch.manual_seed(0)
        model = doors.randomize(Model(single=number % 2 == 0))

        def spread(model: nn.Module, layout: str = layout, each: bool = each) -> None:
            usp.parallelize(model, placed, boundary(each), layout=layout)

        found = doors.compared(model, inputs(*shape), placed, spread)
        wrong |= {f"case {number}: {name}": error for name, error in found.items()}
    return wrong


def test_one_device() -> None:
    assert _compared((1, 1)) == {}


@pytest.mark.parametrize(
    "mesh", [(2, 1), (1, 2), pytest.param((2, 2), marks=pytest.mark.long)], ids=str
)
def test_two_streams(pool, mesh) -> None:
    for wrong in pool.run(_compared, mesh, ranks=mesh[0] * mesh[1]):
        assert wrong == {}


def _gradients(model: nn.Module, shapes: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Of several forwards, each of whose backwards comes after all."""
    outs = [out for shape in shapes for out in model(**inputs(*shape))]
    torch.stack([out.sin().sum() for out in outs]).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _again(each: bool) -> dict[str, float]:
    """Of the first two, rank 0 of two holds as much of each stream where both are cut as one."""
    mesh, shapes = workers.mesh(1, 2), [(11, 5), (10, 5), (9, 7)]
    torch.manual_seed(0)
    whole = doors.randomize(Model(single=False))
    ours = copy.deepcopy(whole)
    ours.again = True
    usp.parallelize(ours, mesh, boundary(each))
    wanted, found = _gradients(whole, shapes), _gradients(ours, shapes)
    usp.all_reduce_gradients(ours, mesh)
    return doors.errors(wanted, found)


def test_checkpoints_of_several_lengths(pool) -> None:
    for each in (False, True):
        for wrong in pool.run(_again, each, ranks=2):
            assert wrong == {}


def _refused(kind: str) -> None:
    mesh, given = workers.mesh(1, 2), inputs(5, 4)
    where = boundary(True)
    if kind == "mask":
        where = replace(where, beside={"table": where.beside["table"]})
    if kind == "none of a stream":
        given = inputs(5, 1)
    model = usp.parallelize(doors.randomize(Model(single=False)), mesh, where)
    if kind == "across":
        tokens = Tokens.of(usp.Spread(mesh, seq_len=9), ())
        answer(replace(tokens, across=(tokens.held,)), *(random(1, 3, 3, 4, seed=1),) * 3)
    model(**given)


REFUSED = {
    "mask": r"attn_mask of \(2, 1, 1, 9\) in attention of two streams that were cut each by itself",
    "none of a stream": r"two streams of \(1, 5\) tokens .* ranks hold \(1, 0\) and \(3, 2\)",
    "across": r"attention of 3 queries to 3 keys of another sequence, .* rank holds \[5\] of 9",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(pool, kind) -> None:
    with pytest.raises(RemoteError, match=REFUSED[kind]):
        pool.run(_refused, kind, ranks=2)


def test_refused_at_once() -> None:
    with pytest.raises(NotImplementedError, match=r"pairs has two streams of tokens \(text\)"):
        usp.parallelize(Model(single=False), None, boundary(False), outputs="local")
    with pytest.raises(ValueError, match=r"two streams \(joint='text'\) beside a prefix or doc"):
        usp.Boundary("pairs", joint=Joint("text"), documents="cu_seqlens")
    with pytest.raises(ValueError, match="pairs of Empty holds no modules"):
        usp.Boundary("pairs").blocks(Empty())


class Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleList()


def _compiled() -> dict[str, float]:
    mesh = workers.mesh(1, 2)
    torch.manual_seed(0)
    whole = doors.randomize(Model(single=False))
    ours = usp.parallelize(copy.deepcopy(whole), mesh, boundary(False), layout="zigzag")
    with compiling.afresh():
        compiled = torch.compile(ours, backend="aot_eager")
        given = inputs(11, 5)
        found = doors.results(compiled, given, lambda m: usp.all_reduce_gradients(m, mesh))
        found = {name.replace("_orig_mod.", ""): x for name, x in found.items()}
        wrong = doors.errors(doors.results(whole, given), found)
        # lengths that have been there are known to a graph
        one_graph = torch.compile(ours, backend="aot_eager", fullgraph=True)
        wanted = {"one graph": whole(**given)[1]}
        wrong |= doors.errors(wanted, {"one graph": one_graph(**given)[1]})
    return wrong


@pytest.mark.long
def test_compiled(pool) -> None:
    for wrong in pool.run(_compiled, ranks=2):
        assert wrong == {}
