"""A model around both kinds of our attention, its place on data and sequence ranks, its gradients.

The same model with torch's own attention on one process is what it is held against.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

import usp

F64 = torch.float64
WIDTH, HEADS, BATCH = 12, 3, 2


class Branch(nn.Module):
    """Projections around `attend`, torch's own attention until another takes its place."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attend: Any = dense_attention

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.packed(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        return self.out(self.attend(*qkv).flatten(2))


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


class DropPath(nn.Module):
    """Leaves a branch of a whole sample out, alike on all ranks of `mesh`."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.mesh = p, None

    def forward(self, branch: Tensor) -> Tensor:
        if not self.p:
            return branch
        with usp.rng.replicated(self.mesh):
            keep = torch.rand(len(branch), 1, 1) >= self.p
        return branch * keep / (1 - self.p)


class Block(nn.Module):
    """Both kinds of attention one behind the other, and an MLP."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=dropout, batch_first=True)
        self.branch = Branch()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
        self.drop_path = DropPath(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.branch(self.norms[1](x))
        return x + self.drop_path(self.mlp(self.norms[2](x)))


class Model(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        # without it no input of a reentrant checkpoint would need a gradient
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def make_model(dropout: float = 0.0) -> Model:
    torch.manual_seed(0)
    return Model(dropout).double()


def spread(model: Model, mesh: usp.SequenceMesh | None, **options: Any) -> Model:
    """The model with our attention in all places."""
    usp.replace_attention(model, mesh, **options)
    for block in model.blocks:
        block.drop_path.mesh = mesh
        block.branch.attend = usp.LongContextAttention(
            mesh, causal=True, dropout_p=block.attention.dropout, **options
        )
    return model


@dataclass(frozen=True)
class Place:
    """Data ranks, each with a sample of its own, times the ranks that share a sequence."""

    data: int
    ring: int
    ulysses: int
    layout: str = "zigzag"
    seq_len: int = 13

    @property
    def ranks(self) -> int:
        return self.data * self.ring * self.ulysses

    @functools.cached_property
    def device_mesh(self) -> DeviceMesh:
        return _device_mesh(self.data, self.ring, self.ulysses)

    @property
    def mesh(self) -> usp.SequenceMesh:
        return usp.SequenceMesh.from_device_mesh(self.device_mesh)

    @property
    def sample(self) -> int:
        return self.device_mesh.get_local_rank("data")

    def model(self, dropout: float = 0.0, **options: Any) -> Model:
        options |= {"layout": self.layout, "seq_len": self.seq_len}
        return spread(make_model(dropout), self.mesh, **options)

    def shard(self, x: Tensor) -> Tensor:
        return usp.shard_sequence(x, self.mesh, 1, self.layout)


@functools.cache
def _device_mesh(*sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("data", "ring", "ulysses"))


def sample_of(index: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a batch; a part of the targets does not count."""
    g = torch.Generator().manual_seed(index + 1)
    x = torch.randn(BATCH, seq_len, WIDTH, generator=g, dtype=F64)
    targets = torch.randint(5, (BATCH, seq_len), generator=g)
    return x, targets.masked_fill(torch.rand(targets.shape, generator=g) < 0.3, -100)


def loss_of(model: nn.Module, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
    logits = model(x).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction=reduction)


def local_loss(model: nn.Module, place: Place) -> Tensor:
    """This rank's part of the mean over the counted tokens of all ranks of its sequence."""
    x, targets = sample_of(place.sample, place.seq_len)
    lost = loss_of(model, place.shard(x), place.shard(targets), "sum")
    return lost / (targets != -100).sum()


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        found[name.removeprefix("module.")] = getattr(grad, "full_tensor", lambda g=grad: g)()
    return found


def expected(place: Place, model: Model | None = None) -> dict[str, Tensor]:
    """One process and torch's own attention: the mean of the samples' losses."""
    model = make_model() if model is None else model
    for index in range(place.data):
        torch.manual_seed(7)
        (loss_of(model, *sample_of(index, place.seq_len), "mean") / place.data).backward()
    return gradients_of(model)


def assert_same(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (actual[name] - gradient).abs().max()
        assert error <= 1e-9 * gradient.abs().max(), f"{name}: {error}"
