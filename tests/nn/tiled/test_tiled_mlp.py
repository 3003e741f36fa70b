"""A module in tiles of tokens is the module: results, every gradient, hooks, and what it keeps."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pool as workers
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import usp
from usp.rng import Drawn
from usp.testing import StorageBytes

F64 = torch.float64
WIDTH, INNER = 5, 11


class Gated(nn.Module):
    """As in Llama; its second product has the weight of the first, and what is beside it scales."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER, bias=False)
        self.down, self.dropout = nn.Linear(INNER, WIDTH), nn.Dropout(p)
        self.tied = nn.Linear(WIDTH, INNER, bias=False)
        self.tied.weight = self.up.weight
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, scale: Any = 1.0, shift: Any = 0.0) -> Tensor:
        rows = x.view(-1, WIDTH) if x.is_contiguous() else x  # as some do
        inner = F.silu(self.gate(x)) * self.up(rows).view_as(self.gate(x)) + self.tied(x)
        return self.down(self.dropout(inner)) * scale + shift


def gated(p: float = 0.0, dtype: torch.dtype = F64) -> Gated:
    torch.manual_seed(0)
    return Gated(p).to(dtype)


def random(*shape: int, seed: int = 1, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def gradients(module: nn.Module, inputs: tuple[Tensor, ...] = ()) -> list[Tensor | None]:
    found = [x.grad for x in (*inputs, *module.parameters())]
    module.zero_grad()
    for x in inputs:
        x.grad = None
    return found


def assert_same(found: list[Tensor | None], wanted: list[Tensor | None]) -> None:
    for actual, expected in zip(found, wanted, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=settings.default.max_examples // 4)
@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    tokens=st.integers(0, 17),
    tiles=st.integers(1, 20),
    last=st.booleans(),
    beside=st.sampled_from(["none", "each token", "all tokens", "features", "number"]),
    frozen=st.booleans(),
    whole=st.booleans(),
)
def test_is_the_plain_call(batch, tokens, tiles, last, beside, frozen, whole) -> None:
    module = gated()
    module.down.weight.requires_grad_(not frozen)
    x = random(*batch, tokens, WIDTH)
    if not last and batch:  # tokens in front: their dim is told
        x = x.transpose(0, -2)
    dim = -2 if last or not batch else 0
    one = list(x.shape)
    one[dim] = 1
    more = {
        "none": (),
        "each token": (random(*x.shape, seed=2), random(*one, seed=3)),
        "all tokens": (random(*one, seed=2),),
        "features": (random(WIDTH, seed=2), random(seed=3)),
        "number": (2.5,),
    }[beside]
    inputs = (x, *(t for t in more if isinstance(t, Tensor)))
    for t in inputs[0 if whole else 1 :]:
        t.requires_grad_()
    inputs = tuple(t for t in inputs if t.is_leaf)
    cotangent = random(*x.shape, seed=9)
    wanted = module(x, *more)
    wanted.backward(cotangent)
    expected = gradients(module, inputs)
    found = usp.tiled_mlp(module, x, tiles, *more, dim=dim)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    found.backward(cotangent)
    assert_same(gradients(module, inputs), expected)
    with torch.no_grad():
        found = usp.tiled_mlp(module, x, tiles, *more, dim=dim)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def by_hand(module: nn.Module, x: Tensor, tiles: int) -> Tensor:
    """Tiles that autograd keeps."""
    return torch.cat([module(part) for part in x.tensor_split(tiles, -2)], -2)


def test_dropout_and_autocast_are_in_the_backward_as_in_the_forward() -> None:
    module, x = gated(0.4, torch.float32), random(2, 13, WIDTH, dtype=torch.float32)
    x.requires_grad_()
    results = []
    for run in (by_hand, usp.tiled_mlp):
        torch.manual_seed(3)
        # one number of the default generator, whatever is drawn in tiles
        drawn = nullcontext() if run is usp.tiled_mlp else Drawn().again()
        with drawn, torch.autocast("cpu", torch.bfloat16):
            out = run(module, x, 4)
        after = torch.get_rng_state()
        torch.manual_seed(4)
        before = torch.get_rng_state()
        out.float().square().sum().backward()
        assert torch.equal(torch.get_rng_state(), before)
        results.append((out, after, gradients(module, (x,))))
    (wanted, state, expected), (found, other, actual) = results
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted) and torch.equal(state, other)
    for one, two in zip(actual, expected, strict=True):
        if two is not None:  # the same products; their sums over tiles in another order
            torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-2 * two.abs().max().item())


def test_sums_over_tiles_are_in_fp32() -> None:
    tokens, module = 600, nn.Linear(1, 1, bias=False).bfloat16()
    x = torch.ones(tokens, 1, dtype=torch.bfloat16)
    usp.tiled_mlp(module, x, tokens).sum().backward()  # in bf16 256 + 1 is 256
    assert module.weight.grad == tokens and module.weight.grad.dtype == torch.bfloat16


def test_hooks_run_once_and_gradients_accumulate() -> None:
    module, x = gated(), random(3, 7, WIDTH).requires_grad_()
    calls: dict[str, int] = dict.fromkeys(["tensor", "accumulated", "forward", "backward"], 0)

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    module.up.weight.register_hook(count("tensor"))
    module.up.weight.register_hook(lambda grad: 2 * grad)  # a hook that changes it, once
    module.up.weight.register_post_accumulate_grad_hook(count("accumulated"))
    module.register_forward_hook(count("forward"))
    module.register_full_backward_hook(count("backward"))
    plain = gated()
    for step in (1, 2):
        usp.tiled_mlp(module, x, 3).sum().backward()
        plain(x.detach()).sum().backward()
        assert set(calls.values()) == {step}
    torch.testing.assert_close(module.up.weight.grad, 2 * plain.up.weight.grad)
    torch.testing.assert_close(module.down.weight.grad, plain.down.weight.grad)
    assert "forward" not in module.__dict__


def test_called_twice_under_a_checkpoint_and_for_some_gradients() -> None:
    module, x = gated(), random(2, 9, WIDTH).requires_grad_()

    def twice(run: Any) -> Tensor:
        return run(module, run(module, x, 4), 2)

    twice(lambda module, x, _: module(x)).square().sum().backward()
    expected = gradients(module, (x,))
    for reentrant in (False, True):
        out = checkpoint(lambda _: twice(usp.tiled_mlp), x, use_reentrant=reentrant)
        out.square().sum().backward()
        assert_same(gradients(module, (x,)), expected)
    (only,) = torch.autograd.grad(twice(usp.tiled_mlp).square().sum(), x)
    torch.testing.assert_close(only, expected[0])
    out = usp.tiled_mlp(module, x, 2)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="tiled_mlp has no second derivative"):
        first.sum().backward()


def test_no_buffer_is_larger_than_a_tiles() -> None:
    wide, tokens, tiles = 64, 96, 8
    module = nn.Sequential(nn.Linear(4, wide), nn.GELU(), nn.Linear(wide, 4))
    x, tile = torch.randn(1, tokens, 4, requires_grad=True), 4 * wide * tokens // tiles
    peaks = []
    for run in (by_hand, usp.tiled_mlp):
        with StorageBytes() as memory:
            run(module, x, tiles).sum().backward()
            left = memory.live
        gradients(module, (x,))
        peaks.append(memory.peak)
        assert memory.largest == tile
    plain, tiled = peaks
    assert plain > 2 * tiles * tile and tiled < 6 * tile
    assert left == 4 * (tokens * 4 + sum(p.numel() for p in module.parameters()))


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x


def _elsewhere(x: Tensor, other: nn.Parameter) -> nn.Module:
    module = nn.Identity()
    module.forward = lambda x: x * other  # type: ignore[method-assign]
    return module


class DropPath(nn.Module):
    drop_prob = 0.5


SOME = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("module", "shape", "more", "tiles", "error", "said"),
    [
        (lambda x: x, (2, 3), (), 2, TypeError, "nn.Module, got function"),
        (SOME, (2, 3), (), 0, ValueError, "tiles must be 1 or more, got 0"),
        (SOME, (2, 3), (), 2.5, TypeError, "tiles must be an integer"),
        (SOME, (3,), (), 2, ValueError, r"x is \(3,\)"),
        (SOME, (4, 3), (torch.ones(2, 3),), 2, ValueError, r"\(2, 3\), and x \(4, 3\) has 4"),
        (nn.BatchNorm1d(3), (4, 3), (), 2, NotImplementedError, "statistics are over the tokens"),
        (nn.Conv1d(3, 3, 3), (4, 3), (), 2, NotImplementedError, r"kernel of \(3,\)"),
        (nn.MultiheadAttention(3, 1), (4, 3), (), 2, NotImplementedError, "attention among"),
        (nn.Sequential(DropPath()), (4, 3), (), 2, NotImplementedError, "0 .*whole samples"),
        (nn.Dropout1d(), (4, 3), (), 2, NotImplementedError, "whole channels"),
        (Writes(), (4, 3), (), 2, ValueError, "changes its buffer seen .* each of 2 tiles"),
        (nn.ReLU(inplace=True), (4, 3), (), 2, ValueError, "changes its argument 0"),
        (nn.ReLU(inplace=True), (2, 4, 3), (), 2, ValueError, "changes its argument 0"),
        (nn.Flatten(0), (4, 3), (), 2, ValueError, r"returns \(6,\) for 2 tokens"),
        (nn.LSTMCell(3, 3), (4, 3), (), 2, NotImplementedError, "returns tuple"),
    ],
)
def test_refusals(module, shape, more, tiles, error, said) -> None:
    with pytest.raises(error, match=said):
        usp.tiled_mlp(module, torch.ones(shape), tiles, *more)


@pytest.mark.parametrize("trained", [False, True])
def test_transforms_are_refused(trained: bool) -> None:
    module = nn.Linear(3, 3).requires_grad_(trained)
    with pytest.raises(NotImplementedError, match=r"tiled_mlp does not run inside of torch.func"):
        torch.func.vmap(lambda x: usp.tiled_mlp(module, x, 2))(torch.ones(2, 4, 3))


def test_what_needs_a_gradient_and_is_not_told_is_refused() -> None:
    other, x = nn.Parameter(torch.ones(3)), torch.ones(4, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"uses a tensor \(3,\) that needs a gradient"):
        usp.tiled_mlp(_elsewhere(x, other), x, 2).sum().backward()
    norm = nn.BatchNorm1d(3).eval()  # its statistics are what it has learned
    assert torch.equal(usp.tiled_mlp(norm, x, 3), norm(x))


class Net(nn.Module):
    def __init__(self, tiles: int | None) -> None:
        super().__init__()
        self.first, self.mlp, self.tiles = nn.Linear(WIDTH, WIDTH), gated(), tiles
        del self.mlp.unused  # FSDP hangs over what nobody uses

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + (self.mlp(x) if self.tiles is None else usp.tiled_mlp(self.mlp, x, self.tiles))


def net(tiles: int | None) -> Net:
    torch.manual_seed(5)
    return Net(tiles).double()


def trained(model: nn.Module, samples: list[int], wrapped: nn.Module | None = None) -> list[Tensor]:
    """Gradients that backwards accumulate; ranks send them in the last."""
    for seed in samples:
        is_last = seed == samples[-1]
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(is_last)
        with nullcontext() if wrapped is None or is_last else wrapped.no_sync():
            (wrapped or model)(random(2, 7 + seed, WIDTH, seed=seed)).square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    return [getattr(g, "full_tensor", lambda g=g: g)() for g in grads]


def _wrapped(kind: str) -> list[Tensor]:
    rank, model = dist.get_rank(), net(2 + dist.get_rank())
    world = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    if kind == "DDP":
        return trained(model, [rank, 2 + rank], DistributedDataParallel(model))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float64)
    for module in {"MLP": (model.mlp, model), "model": (model,)}[kind]:
        fully_shard(module, mesh=world, mp_policy=policy)
    return trained(model, [rank, 2 + rank])


@pytest.mark.parametrize("kind", ["DDP", "MLP", pytest.param("model", marks=pytest.mark.long)])
def test_under_ddp_and_fsdp(pool, kind: str) -> None:
    expected = [grad / 2 for grad in trained(net(None), [0, 1, 2, 3])]
    for found in pool.run(_wrapped, kind, ranks=2):
        assert_same(found, expected)


def _inside() -> None:
    model = net(2)
    fully_shard(model.mlp.up, mesh=DeviceMesh.from_group(dist.group.WORLD, "cpu"))
    model(random(1, 4, WIDTH))


def test_fsdp_inside_of_the_module_is_refused(pool) -> None:
    for outcome in pool.outcomes(_inside, ranks=2):
        assert isinstance(outcome, workers.RemoteError)
        assert "up.weight of the module (Gated) is a DTensor" in outcome.message
    with pytest.raises(NotImplementedError, match="DataParallel is to be called once"):
        usp.tiled_mlp(nn.DataParallel(copy.deepcopy(SOME)), torch.ones(2, 3), 2)
