"""Attention of tensors that have shapes alone, and torch.export."""

from __future__ import annotations

import io
from typing import Any

import pool as worker
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export

import usp
from usp.distributed import mesh as topology

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "documents": {"cu_seqlens": (0, 3, 11), "causal": True},
    "dropout, lse": {"dropout_p": 0.3, "return_lse": True},
}


def tensors(device: str, length: int = 11, batch: int = 2) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    return {
        "q": normal(batch, length, 4, 5).requires_grad_(),
        "k": normal(batch, length, 2, 5).requires_grad_(),
        "v": normal(batch, length, 2, 3).requires_grad_(),
        "attn_bias": normal(1, 4, 1, length).requires_grad_(),
        "alibi_slopes": torch.ones(4, device=device),
        "key_padding_mask": normal(batch, length) > 1,
    }


def described(given: dict[str, Tensor], mesh: Any = None, **options: Any) -> list[Any]:
    """Shapes and dtypes of results and gradients."""
    q, k, v = (given[name] for name in "qkv")
    extras = {name: x for name, x in given.items() if len(name) > 1}
    result = usp.long_context_attention(q, k, v, mesh, **extras, **options)
    outputs = result if isinstance(result, tuple) else (result,)
    leaves = [x for x in given.values() if x.requires_grad]
    gradients = torch.autograd.grad([x.sum() for x in outputs], leaves)
    return [(x.shape, x.dtype) for x in (*outputs, *gradients)]


@pytest.mark.parametrize("name", OPTIONS)
def test_shapes_alone(name: str) -> None:
    wanted = described(tensors("cpu"), **OPTIONS[name])
    assert described(tensors("meta"), **OPTIONS[name]) == wanted
    with FakeTensorMode():
        given = tensors("cpu")
        assert described(given, **OPTIONS[name]) == wanted
    assert described(given, **OPTIONS[name]) == wanted, "outside of the mode too"


def shapes_on_a_mesh(name: str) -> bool:
    mesh = worker.mesh(2, 2)
    given, fake = {}, {}
    for place in (given, fake):
        with FakeTensorMode() if place is fake else torch.enable_grad():
            place |= tensors("cpu", 2 + (mesh.rank < 3))
            place["attn_bias"] = torch.randn(2, 4, len(place["q"][0]), 11, requires_grad=True)
    return described(given, mesh, **OPTIONS[name]) == described(fake, mesh, **OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_shapes_on_a_mesh(pool, name: str) -> None:
    assert pool.run(shapes_on_a_mesh, name, ranks=4) == [True] * 4


class Attention(nn.Module):
    """With or without documents, whose boundaries are an input of the graph."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        window = {"window_size": (5, None), "cu_seqlens": cu_seqlens}
        return usp.long_context_attention(q * 2, k, v, causal=True, **window)


@pytest.mark.parametrize("documents", [False, True])
def test_export_of_any_batch_and_length(documents: bool) -> None:
    batch, length = Dim("batch", max=64), Dim("length", min=2, max=4096)
    calls = []
    for sizes, bounds in (((11, 2), (0, 3, 11)), ((29, 3), (0, 4, 9, 20, 29))):
        given = tensors("cpu", *sizes)
        leaves = [given[name].detach() for name in "qkv"]
        calls.append((*leaves, torch.tensor(bounds) if documents else None))
    dims = tuple({0: batch, 1: length} for _ in range(3))
    number = {0: Dim("number", min=2, max=99)} if documents else None
    program = export(Attention(), calls[0], dynamic_shapes=(*dims, number))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for call in calls:
        assert torch.equal(loaded(*call), Attention()(*call))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = usp.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.attention(x, x, x)


def test_export_of_multihead_attention() -> None:
    dims = {0: Dim("batch", max=64), 1: Dim("length", min=2, max=512)}
    model = Layer().eval()
    program = export(model, (torch.randn(2, 11, 12),), dynamic_shapes=(dims,))
    x = torch.randn(3, 17, 12)
    for found, wanted in zip(program.module()(x), model(x), strict=True):
        torch.testing.assert_close(found, wanted)


def exported_on_a_mesh() -> tuple[bool, str]:
    """Whether it runs in the process that made it, and what another mesh's process says."""
    mesh = worker.mesh(2, 2)

    class Model(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return usp.long_context_attention(q, q, q, mesh, seq_len=11)

    q = torch.randn(1, 2 + (mesh.rank < 3), 4, 2)
    program = export(Model(), (q,))
    same = torch.equal(program.module()(q), Model()(q))
    forgotten = topology._BY_NAME.pop(mesh.name)  # as in another process
    try:
        program.module()(q)
    except RuntimeError as error:
        return same, str(error)
    finally:
        topology._BY_NAME[mesh.name] = forgotten
    return same, "nothing said"


def test_export_on_a_mesh_belongs_to_that_mesh(pool) -> None:
    for same, said in pool.run(exported_on_a_mesh, ranks=4):
        assert same
        assert "is gone: hold the mesh as long as what was compiled for it" in said
