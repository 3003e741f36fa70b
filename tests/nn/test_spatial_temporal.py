"""The block of a video transformer on a mesh equals plain torch on the whole."""

from __future__ import annotations

from typing import Any

import compiling
import pool as worker
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import usp
from usp import dsp
from usp.testing import WireBytes, dense_attention

WIDTH, HEADS, TEXT = 8, 2, 6
Shape = tuple[int, int, int]  # samples, frames, places
LONG = pytest.mark.long


def inputs(shape: Shape, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """A video, a text and a cotangent."""
    torch.manual_seed(0)
    b, t, s = shape
    tensors = torch.randn(b, t, s, WIDTH), torch.randn(b, 5, TEXT), torch.randn(b, t, s, WIDTH)
    return [x.to(dtype) for x in tensors]


def blocks(dtype: torch.dtype = torch.float64) -> torch.nn.ModuleList:
    torch.manual_seed(1)
    made = (dsp.SpatialTemporalBlock(WIDTH, HEADS, TEXT, dtype=dtype) for _ in range(2))
    return torch.nn.ModuleList(made)


def plain(block: Any, x: Tensor, text: Tensor, lengths: list[int] | None) -> Tensor:
    """The same block of the whole, written down once more."""

    def attend(a: Any, x: Tensor, to: Tensor | None = None) -> Tensor:
        y = a.norm(x)
        q, (k, v) = a.q(y), a.kv(y if to is None else to).chunk(2, -1)
        q, k, v = (z.unflatten(-1, (HEADS, WIDTH // HEADS)) for z in (q, k, v))
        if to is None or lengths is None:
            return a.out(dense_attention(q, k, v)[0].flatten(2))
        rows = [
            dense_attention(q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n])[0]
            for i, n in enumerate(lengths)
        ]
        return a.out(torch.cat(rows).flatten(2))

    x = x + torch.stack([attend(block.space, x[:, t]) for t in range(x.shape[1])], 1)
    x = x + torch.stack([attend(block.time, x[:, :, s]) for s in range(x.shape[2])], 2)
    x = x + attend(block.text, x.flatten(1, 2), text).view_as(x)
    return x + block.mlp(x)


def gradients(out: Tensor, leaves: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def expected(shape: Shape, lengths: list[int] | None) -> list[Tensor]:
    x, text, cotangent = inputs(shape)
    model, out = blocks(), x.requires_grad_()
    for block in model:
        out = plain(block, out, text.requires_grad_(), lengths)
    return gradients(out, [x, text, *model.parameters()], cotangent)


def found(
    mesh: tuple[int, int] | None,
    shape: Shape,
    lengths: list[int] | None = None,
    again: bool = False,
) -> list[Tensor]:
    """The whole result, and this rank's part of each gradient."""
    on = None if mesh is None else worker.mesh(*mesh)
    x, text, cotangent = inputs(shape)
    model = blocks()
    shard = dsp.DynamicShard.split(x.requires_grad_(), (1, 2), on)
    for block in model:
        args = shard, text.requires_grad_(), lengths
        shard = checkpoint(block, *args, use_reentrant=False) if again else block(*args)
    assert shard.dim == 2
    mine = dsp.split(cotangent, 2, on)
    results = gradients(shard.local, [x, text, *model.parameters()], mine)
    return [dsp.gather(results[0], 2, on, shape[2]), *results[1:]]


def compare(parts: list[list[Tensor]], wanted: list[Tensor]) -> None:
    out, *sums = (torch.stack(each) for each in zip(*parts, strict=True))
    for each, reference in zip(
        (*out, *(x.sum(0) for x in sums)), (*[wanted[0]] * len(out), *wanted[1:]), strict=True
    ):
        torch.testing.assert_close(each, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("lengths", [None, [5, 2]], ids=str)
def test_one_device(lengths: list[int] | None) -> None:
    compare([found(None, (2, 3, 5), lengths)], expected((2, 3, 5), lengths))


CASES = [
    ((2, 1), (2, 5, 7)),
    ((1, 2), (1, 1, 3)),  # a rank without frames
    pytest.param((2, 2), (2, 7, 5), marks=LONG),
    pytest.param((4, 1), (1, 3, 2), marks=LONG),  # ranks without frames and without places
]


@pytest.mark.parametrize(("mesh", "shape"), CASES, ids=str)
def test_on_a_mesh(pool, mesh: tuple[int, int], shape: Shape) -> None:
    again = shape[0] == 2  # computed again in the backward
    parts = pool.run(found, mesh, shape, None, again, ranks=mesh[0] * mesh[1])
    compare(parts, expected(shape, None))


@LONG
@settings(max_examples=settings.default.max_examples // 5)
@given(
    st.sampled_from([(2, 1), (1, 3), (2, 2), (5, 1)]),
    st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6)),
    st.lists(st.integers(0, 5), min_size=2, max_size=2),
    st.booleans(),
)
def test_any_shape(
    pool, mesh: tuple[int, int], shape: Shape, lengths: list[int], again: bool
) -> None:
    lengths = lengths[: shape[0]]
    parts = pool.run(found, mesh, shape, lengths, again, ranks=mesh[0] * mesh[1])
    compare(parts, expected(shape, lengths))


def wire() -> tuple[list[int], list[int]]:
    """Bytes of the first block and of the second, forward and backward."""
    mesh = worker.mesh(2, 1)
    x, text, cotangent = inputs((1, 5, 7), torch.bfloat16)
    shard = dsp.DynamicShard.split(x.requires_grad_(), (1, 2), mesh, validate=False)
    sent = []
    for block in blocks(torch.bfloat16):
        with WireBytes() as counted:
            shard = block(shard, text)
        sent.append(counted.sent)
    with WireBytes() as counted:
        shard.local.backward(dsp.split(cotangent, 2, mesh))
    width = WIDTH * 2
    t, s = len(usp.positions(5, mesh)), len(usp.positions(7, mesh))
    to_space, to_time = t * (7 - s) * width, s * (5 - t) * width
    return [*sent, counted.sent], [to_space, to_time + to_space, 2 * to_time + to_space]


def test_two_switches_a_block_and_nothing_else(pool) -> None:
    for sent, formula in pool.run(wire, ranks=2):
        assert sent == formula


def test_refusals() -> None:
    block = dsp.SpatialTemporalBlock(8, 2)
    x = torch.zeros(1, 3, 5, 8)
    shard = dsp.DynamicShard.split(x, (1, 2), None)
    with pytest.raises(TypeError, match=r"x must be a usp.dsp.DynamicShard, got Tensor"):
        block(x)
    with pytest.raises(ValueError, match=r"\(B, T, S, 8\) with dims \(1, 2\), got .* \(1, 3\)"):
        block(dsp.DynamicShard.split(x, (1, 3), None))
    with pytest.raises(ValueError, match=r"got shape \(1, 3, 5, 4\)"):
        block(dsp.DynamicShard.split(x[..., :4], (1, 2), None))
    with pytest.raises(ValueError, match=r"text is \(1, 2, 8\), but text_dim of the block is None"):
        block(shard, torch.zeros(1, 2, 8))
    with pytest.raises(ValueError, match="text is None, but text_dim of the block is 6"):
        dsp.SpatialTemporalBlock(8, 2, 6)(shard)
    with pytest.raises(ValueError, match="dim 8 does not divide by num_heads 3"):
        dsp.SpatialTemporalBlock(8, 3)


def compiled() -> list[str]:
    """What differs from eager."""
    mesh, compiler, wrong = worker.mesh(2, 2), compiling.Counting("aot_eager"), []
    model = blocks()[0]

    def run(x: Tensor, text: Tensor) -> Tensor:
        shard = dsp.DynamicShard.split(x, (1, 2), mesh)
        return model(shard, text).whole(2).local

    with compiling.afresh():
        fast = torch.compile(run, fullgraph=True, backend=compiler)
        x, text, cotangent = inputs((2, 5, 7))
        leaves = [x.requires_grad_(), text.requires_grad_(), *model.parameters()]
        mine = dsp.split(cotangent, 1, mesh)
        ours, theirs = (gradients(each(x, text), leaves, mine) for each in (fast, run))
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if not torch.allclose(a, b, rtol=1e-12, atol=1e-12):
                wrong.append(f"{i}: {(a - b).abs().max()}")
    return wrong if compiler.graphs == 1 else [*wrong, f"{compiler.graphs} graphs"]


@LONG
def test_one_graph(pool) -> None:
    assert pool.run(compiled, ranks=4) == [[]] * 4


class Video(torch.nn.Module):
    def __init__(self, model: torch.nn.ModuleList) -> None:
        super().__init__()
        self.blocks = model

    def forward(self, shard: dsp.DynamicShard, text: Tensor) -> dsp.DynamicShard:
        for block in self.blocks:
            shard = block(shard, text)
        return shard


def under_fsdp() -> list[Tensor]:
    """Gradients of the parameters, gathered, of blocks that FSDP cuts over the ranks."""
    mesh = worker.mesh(1, 2)
    x, text, cotangent = inputs((2, 5, 7))
    model = Video(blocks())
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh.device_mesh["ring"])
        module.set_gradient_divide_factor(1.0)  # sequence ranks add
    out = model(dsp.DynamicShard.split(x, (1, 2), mesh), text).local
    out.backward(dsp.split(cotangent, 2, mesh))
    return [p.grad.full_tensor() for p in model.parameters()]


@LONG
def test_fsdp_finds_the_tensor_inside(pool) -> None:
    wanted = expected((2, 5, 7), None)[3:]
    for found_ in pool.run(under_fsdp, ranks=2):
        for each, reference in zip(found_, wanted, strict=True):
            torch.testing.assert_close(each, reference, rtol=1e-9, atol=1e-11)
