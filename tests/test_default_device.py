"""Another default device or dtype of torch changes nothing: "meta" stands for a GPU beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pool as worker
import pytest
import torch
from torch import Tensor, nn

import usp
import usp.testing
from usp.planning import layout as layouts
from usp.planning import plan

DEFAULTS: dict[str, dict[str, Any]] = {
    "meta": {"device": "meta"},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
}


@contextmanager
def defaults(device: str | None = None, dtype: torch.dtype | None = None) -> Iterator[None]:
    """As the user has set them, with nothing planned before."""
    layouts.rows.cache_clear()
    plan.make_plan.cache_clear()
    before = torch.get_default_dtype()
    try:
        if dtype is not None:
            torch.set_default_dtype(dtype)
        if device is not None:
            torch.set_default_device(device)
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def tensors(*shape: int, count: int = 3) -> list[Tensor]:
    random = torch.Generator("cpu").manual_seed(3)
    return [
        torch.randn(shape, generator=random, dtype=torch.float32, device="cpu").requires_grad_()
        for _ in range(count)
    ]


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    (dout,) = tensors(*out.shape, count=1)
    found = torch.autograd.grad(out, leaves, dout.detach(), allow_unused=True)
    return [out.detach(), *(x for x in found if x is not None)]


def options(name: str, local: int, whole: int) -> dict[str, Any]:
    cpu = {"device": "cpu", "dtype": torch.float32}
    return {
        "plain": {},
        "masks": {"causal": True, "window_size": (5, None), "prefix_len": 3},
        "documents": {"cu_seqlens": (0, 4, whole), "layout": usp.DocumentZigzag((0, 4, whole))},
        "striped": {"layout": "striped", "causal": True, "transport": "allgather"},
        "dropout": {"dropout_p": 0.3, "layout": "zigzag"},
        "extras": {
            "attn_bias": torch.ones(1, 2, local, whole, **cpu),
            "alibi_slopes": torch.ones(2, **cpu),
            "key_padding_mask": torch.zeros(1, local, dtype=torch.bool, device="cpu"),
            "softcap": 2.5,
            "return_lse": True,
        },
        "reference": {"backend": "reference", "causal": True},
        "chunks": {"chunks": 3, "head_chunks": 2, "causal": True},
    }[name]


OPTIONS = ("plain", "masks", "documents", "striped", "dropout", "extras", "reference", "chunks")


def attended(name: str, shape: tuple[int, int] | None) -> list[Tensor]:
    mesh = None if shape is None else worker.mesh(*shape)
    whole = 9
    given = options(name, 9, whole)
    layout = given.get("layout", "contiguous")
    held = usp.positions(whole, mesh, layout)
    given = options(name, len(held), whole)
    torch.manual_seed(1)
    leaves = tensors(1, whole, 2, 4)
    mine = [usp.shard_sequence(x, mesh, 1, layout) for x in leaves]
    out = usp.long_context_attention(*mine, mesh, **given)
    out = out[0] if isinstance(out, tuple) else out
    return gradients(usp.unshard_sequence(out, mesh, 1, layout), leaves)


def multihead(shape: tuple[int, int] | None) -> list[Tensor]:
    mesh = None if shape is None else worker.mesh(*shape)
    torch.manual_seed(1)
    with torch.device("cpu"):
        layer = nn.MultiheadAttention(8, 2, 0.2, add_bias_kv=True, dtype=torch.float32)
    ours = usp.MultiheadAttention.from_torch(layer, mesh)
    (x,) = tensors(9, 1, 8, count=1)
    mine = usp.shard_sequence(x, mesh, 0)
    mask = torch.zeros(len(mine), 9, device="cpu", dtype=torch.float32)
    out, weights = ours(mine, mine, mine, attn_mask=mask)
    found = gradients(out, [x, *ours.parameters()])
    for parameter, gradient in zip(ours.parameters(), found[2:], strict=True):
        parameter.grad = gradient
    usp.all_reduce_gradients(ours, mesh)
    return [*found, weights.detach(), *(p.grad for p in ours.parameters())]


def linear(shape: tuple[int, int] | None) -> list[Tensor]:
    mesh = None if shape is None else worker.mesh(*shape)
    torch.manual_seed(1)
    leaves = tensors(1, 9, 2, 4)
    q, k, v = (usp.shard_sequence(x, mesh, 1) for x in leaves)
    out = usp.linear_attention(q, k, v, -k.abs(), mesh=mesh, cu_seqlens=(0, 4, 9))
    out = out + usp.linear_attention(q, k, v, mesh=mesh, causal=False)
    mixed = usp.causal_conv1d(k.flatten(2), leaves[0][0, :8, 0], mesh=mesh, cu_seqlens=(0, 7, 9))
    options = {"beta": k.sigmoid().mean(3), "mesh": mesh, "return_state": True}
    delta, _ = usp.linear_attention(q, mixed.view(k.shape) / 9, v, -k.abs(), **options)
    out = out + delta
    return gradients(usp.unshard_sequence(out, mesh, 1), leaves)


def decoded(shape: tuple[int, int] | None) -> list[Tensor]:
    mesh = None if shape is None else worker.mesh(*shape)
    q, k, v = (x.detach() for x in tensors(2, 9, 2, 4))
    cache = usp.ShardedCache(mesh, window=3, first_keys=1, padding=(1, 0), page=1)
    cache.extend(*(usp.shard_sequence(x, mesh, 1, "zigzag") for x in (k, v)), "zigzag", 9)
    for i in range(9):
        cache.append(k[:, i : i + 1], v[:, i : i + 1])
    cache = cache.select([1, 0])
    cache.crop(17)
    cache.append(k[:, :1], v[:, :1])
    return [usp.decode_attention(q[:, :1], cache, mesh), cache.k]


def random_numbers(shape: tuple[int, int] | None) -> list[Tensor]:
    mesh = None if shape is None else worker.mesh(*shape)
    found = []
    for stream in (usp.rng.replicated, usp.rng.sharded):
        torch.manual_seed(1)
        with stream(mesh):
            found.append(torch.rand(3, device="cpu", dtype=torch.float32))
    return found


def a_mesh(shape: tuple[int, int]) -> list[Tensor]:
    """Made under another default, too."""
    mesh = usp.init_mesh(*shape, device_type="cpu")
    numbers = mesh.gather_numbers(mesh.rank)
    return [torch.tensor(numbers, device="cpu"), usp.positions(7, mesh, "zigzag")]


def twice(name: str, function: Callable[..., list[Tensor]], *args: Any) -> list[bool]:
    """Whether each result is the same to the bit with another default."""
    with defaults():
        expected = function(*args)
    with defaults(**DEFAULTS[name]):
        found = function(*args)
    return [
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        for a, b in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_attention(pool, name: str, default: str) -> None:
    assert all(twice(default, attended, name, None))
    for same in pool.run(twice, default, attended, name, (2, 1), ranks=2):
        assert all(same), same
    for same in pool.run(twice, default, attended, name, (2, 2), ranks=4):
        assert all(same), same


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("function", [multihead, linear, decoded, random_numbers])
def test_modules_and_random_numbers(pool, function: Callable, default: str) -> None:
    assert all(twice(default, function, None))
    for same in pool.run(twice, default, function, (1, 2), ranks=2):
        assert all(same), same


@pytest.mark.parametrize("default", DEFAULTS)
def test_meshes(pool, default: str) -> None:
    for same in pool.run(twice, default, a_mesh, (1, 2), ranks=2):
        assert all(same), same


def oracle() -> list[Tensor]:
    leaves = tensors(1, 9, 2, 4)
    keep = usp.testing.dropout_multiplier(0.3, 7, 1, 2, 9, 9)
    out, _ = usp.testing.dense_attention(
        *leaves,
        cu_seqlens=(0, 4, 9),
        alibi_slopes=torch.ones(2, device="cpu"),
        dropout_keep=keep,
    )
    return gradients(out, leaves)


def test_the_oracle() -> None:
    assert all(twice("meta", oracle))
