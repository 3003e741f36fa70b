"""The loss in tiles is that of all logits: value, every gradient, on ranks, and what it keeps."""

from __future__ import annotations

import math
from typing import Any

import pool as workers
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pool import RemoteError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import usp
from usp.testing import StorageBytes

F64 = torch.float64
CLASSES, CHANNELS = 11, 4


def case(*shape: int, valid: float = 0.7, seed: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, shape, generator=g)
    labels[torch.rand(shape, generator=g) >= valid] = -100
    return {
        "hidden": 2 * torch.randn(*shape, CHANNELS, generator=g, dtype=F64),
        "weight": torch.randn(CLASSES, CHANNELS, generator=g, dtype=F64),
        "labels": labels,
        "bias": torch.randn(CLASSES, generator=g, dtype=F64),
    }


def plain(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """The mean over valid labels, of all logits at once, by torch."""
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    labels = labels.flatten()
    valid = labels != -100
    total = F.cross_entropy(logits, labels, reduction="sum", **options)
    total = total + z_loss * (logits.logsumexp(1).square() * valid).sum()
    return total / valid.sum().clamp(min=1)


def leaves(tensors: dict[str, Tensor], *frozen: str) -> dict[str, Tensor]:
    return {
        name: x.clone().requires_grad_(x.is_floating_point() and name not in frozen)
        for name, x in tensors.items()
    }


def gradients(tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {name: x.grad for name, x in tensors.items() if x.is_floating_point()}


@settings(max_examples=settings.default.max_examples // 5)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    tiles=st.none() | st.integers(1, 12),
    valid=st.sampled_from([0.0, 0.6, 1.0]),
    biased=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 0.01]),
    softcap=st.sampled_from([None, 1.5]),
    frozen=st.sampled_from([(), ("hidden",), ("weight", "bias")]),
    turned=st.booleans(),
)
def test_is_that_of_all_logits(shape, tiles, valid, biased, frozen, turned, **options) -> None:
    tensors = case(*shape, valid=valid)
    if not biased:
        del tensors["bias"]
    if turned and len(shape) > 1:  # not side by side in memory
        tensors["hidden"] = tensors["hidden"].transpose(0, 1).contiguous().transpose(0, 1)
    whole, mine = leaves(tensors, *frozen), leaves(tensors, *frozen)
    expected, found = plain(**whole, **options), usp.tiled_cross_entropy(**mine, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for loss in (expected, found):
        (1024 * loss).backward()
    for name, grad in gradients(mine).items():
        wanted = whole[name].grad
        assert (grad is None) == (wanted is None), name
        if grad is not None:
            torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-11)


def test_derivatives_by_finite_differences() -> None:
    tensors = leaves(case(5))
    labels = tensors.pop("labels")

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        more = {"label_smoothing": 0.1, "z_loss": 0.02, "softcap": 2.0, "bias": bias}
        return usp.tiled_cross_entropy(hidden, weight, labels, tiles=3, **more)

    assert torch.autograd.gradcheck(loss, tuple(tensors.values()))
    (first,) = torch.autograd.grad(loss(**tensors), tensors["weight"], create_graph=True)
    with pytest.raises(NotImplementedError, match="tiled_cross_entropy has no second derivative"):
        first.sum().backward()


def test_no_buffer_is_larger_than_a_tile_of_logits() -> None:
    tokens, classes, channels, tiles = 96, 128, 4, 8
    hidden = torch.randn(1, tokens, channels, requires_grad=True)
    weight = torch.randn(classes, channels, requires_grad=True)
    labels, tile = torch.randint(classes, (1, tokens)), 4 * classes * tokens // tiles
    with StorageBytes() as all_at_once:
        F.cross_entropy(F.linear(hidden, weight)[0], labels[0]).backward()
    hidden.grad = weight.grad = None
    with StorageBytes() as memory:
        loss = usp.tiled_cross_entropy(hidden, weight, labels, tiles=tiles)
        assert memory.live <= 4 * tokens + 100  # between, the log-sum-exp of each token
        loss.backward()
    kept = 4 * channels * (classes + tokens)
    assert memory.largest == tile and memory.peak < 1.5 * tile + kept + 5000
    assert all_at_once.largest == tiles * tile and all_at_once.peak > 2 * tiles * tile
    # where nobody says how many, a tile of logits is about as large as hidden
    with StorageBytes() as memory, torch.no_grad():
        usp.tiled_cross_entropy(hidden, weight, labels)
    assert memory.largest == 4 * tokens * channels


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, CHANNELS)

    def forward(self, ids: Tensor, tiles: int | None, mesh: Any = None) -> Tensor:
        hidden, weight = self.embed(ids).tanh(), self.embed.weight
        if tiles is None:
            return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), ids.flatten())
        return usp.tiled_cross_entropy(hidden, weight, ids, mesh, tiles=tiles)


def test_tied_weights_hooks_accumulation_and_autocast() -> None:
    torch.manual_seed(0)
    model, calls = Tied(), []
    ids = torch.randint(CLASSES, (2, 7))
    model.embed.weight.register_post_accumulate_grad_hook(lambda p: calls.append(1))
    found = {}
    for tiles in (None, 3):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=False):
                model(ids, tiles).backward()
        exact = model.embed.weight.grad
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, tiles)
        loss.backward()
        found[tiles] = exact, loss.detach(), model.embed.weight.grad
        model.zero_grad()
    assert len(calls) == 6
    torch.testing.assert_close(found[3][0], found[None][0])
    torch.testing.assert_close(found[3][1:], found[None][1:], rtol=2e-2, atol=2e-3)
    assert found[3][1].dtype == torch.float32


def test_fp16_is_scaled_before_it_is_rounded() -> None:
    """A gradient of 1e-7 is zero in fp16, and 65536 of it are not."""
    hidden = torch.full((1, 1), 1e-3, dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(1, dtype=torch.int64)
    (65536 * usp.tiled_cross_entropy(hidden, weight, labels, count=1e7)).backward()
    torch.testing.assert_close(hidden.grad.item(), -65536e-7, rtol=1e-2, atol=0)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float16
    # and the sums over tiles are in fp32: in bf16 128 + 0.5 is 128
    ones, labels = torch.ones(600, 1).bfloat16(), torch.zeros(600, dtype=torch.int64)
    bias = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    zeros = torch.zeros(2, 1, dtype=torch.bfloat16)
    loss = usp.tiled_cross_entropy(ones, zeros, labels, tiles=600, bias=bias, count=1)
    torch.testing.assert_close(loss.item(), 600 * math.log(2), rtol=1e-6, atol=0)
    loss.backward()
    assert bias.grad.tolist() == [-300, 300]


def _of_ranks(held: tuple[int, ...], valid: float, tiles: int) -> list[Tensor]:
    mesh, tensors = workers.mesh(1, len(held)), case(2, sum(held), valid=valid)
    tensors["labels"][:, sum(held[:1]) : sum(held[:2])] = -100  # the second rank has none
    mine, options = leaves(tensors), {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 2.0}
    whole = leaves(tensors)
    wanted = plain(**whole, **options)
    wanted.backward()
    cut = {name: mine[name].split(held, 1)[mesh.rank] for name in ("hidden", "labels")}
    # on each rank another number of tiles
    loss = usp.tiled_cross_entropy(**(mine | cut), mesh=mesh, tiles=tiles + mesh.rank, **options)
    loss.backward()
    parameters = [nn.Parameter(mine[name].detach()) for name in gradients(mine)]
    for parameter, name in zip(parameters, gradients(mine), strict=True):
        parameter.grad = mine[name].grad
    usp.all_reduce_gradients(parameters, mesh)
    return [
        wanted.detach(),
        loss.detach(),
        *gradients(whole).values(),
        *(p.grad for p in parameters),
    ]


@pytest.mark.parametrize(
    ("held", "valid"),
    [((7, 5), 0.7), ((6, 0), 0.0), pytest.param((5, 4, 0, 9), 0.7, marks=pytest.mark.long)],
    ids=str,
)
def test_the_mean_of_the_whole_and_the_sum_of_gradients(pool, held, valid) -> None:
    for wanted, loss, *grads in pool.run(_of_ranks, held, valid, 2, ranks=len(held)):
        torch.testing.assert_close(loss, wanted, rtol=1e-13, atol=0)
        for expected, found in zip(grads[:3], grads[3:], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


def _sharded() -> tuple[Tensor, Tensor]:
    """Under FSDP2 on sequence ranks, which averages; the weight is the embedding's, too."""
    mesh = workers.mesh(1, 2)
    torch.manual_seed(0)
    model, whole = Tied().double(), Tied().double()
    whole.load_state_dict(model.state_dict())
    ids = torch.randint(CLASSES, (2, 7))
    whole(ids, None).backward()
    fully_shard(model, mesh=DeviceMesh.from_group(dist.group.WORLD, "cpu"))
    for _ in range(2):
        (model(ids.split((4, 3), 1)[mesh.rank], 2, mesh) * mesh.size / 2).backward()
    return whole.embed.weight.grad, model.embed.weight.grad.full_tensor()


def test_under_fsdp(pool) -> None:
    for expected, found in pool.run(_sharded, ranks=2):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


def _differ(changed: dict[str, Any]) -> None:
    mesh = workers.mesh(1, 2)
    usp.tiled_cross_entropy(**(case(3) | (changed if mesh.rank else {})), mesh=mesh)


def test_ranks_that_differ_and_what_does_not_fit_are_refused(pool) -> None:
    no_class = torch.full((3,), CLASSES)
    for said, changed in (
        ("z_loss", {"z_loss": 0.1}),
        ("tiles must be 1 or more, got 0", {"tiles": 0}),
        (f"index {CLASSES} is out of bounds", {"labels": no_class}),
    ):
        for outcome in pool.outcomes(_differ, changed, ranks=2):
            assert isinstance(outcome, RemoteError) and said in outcome.message
    good = case(3)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("one for each token", {"labels": good["labels"][:2]}),
        ("class indices", {"labels": good["labels"].double()}),
        ("has 4 channels", {"weight": torch.ones(5, 3, dtype=F64)}),
        (r"bias is \(2,\) for 11 classes", {"bias": torch.ones(2, dtype=F64)}),
        ("weight is torch.float32 and hidden torch.float64", {"weight": good["weight"].float()}),
        ("between 0 and 1, got 2", {"label_smoothing": 2}),
        ("z_loss must be 0 or more, got -1", {"z_loss": -1}),
        ("softcap must be more than 0, got 0", {"softcap": 0}),
        ("tiles must be 1 or more, got 0", {"tiles": 0}),
    ]
    for said, changed in wrong:
        with pytest.raises(ValueError, match=said):
            usp.tiled_cross_entropy(**(good | changed))
