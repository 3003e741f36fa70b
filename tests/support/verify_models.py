"""Models whose own code shards them, rightly or with one fault of a kind that people make.

Every module that must know has ``spread``: None is one device. ``wrong`` names the fault.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import usp

WIDTH, HEADS, TOKENS, CLASSES = 12, 4, 13, 5


class Part(nn.Module):
    """A part of a model that may be spread."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        self.spread: usp.Spread | None = None
        self.wrong = wrong

    def positions(self, x: Tensor) -> Tensor:
        if self.spread is None:
            return torch.arange(x.shape[1])
        return self.spread.positions()


class Table(Part):
    """A table of positions, read by slices."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__(wrong)
        self.table = nn.Parameter(torch.randn(40, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.spread is None or self.wrong == "table":
            return x + self.table[: x.shape[1]]
        return x + self.table[self.positions(x)]


class Numbers(Part):
    """The same by nn.Embedding."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__(wrong)
        self.table = nn.Embedding(40, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        own = torch.arange(x.shape[1]) if self.wrong == "embedding" else self.positions(x)
        return x + self.table(own)


class Sines(Part):
    """The same by sines, without weights."""

    def forward(self, x: Tensor) -> Tensor:
        own = torch.arange(x.shape[1]) if self.wrong == "sines" else self.positions(x)
        return x + torch.sin(own[:, None] / (1 + torch.arange(WIDTH))).to(x)


class Attention(Part):
    """By usp, with a window, sinks, RoPE and what may be forgotten of them."""

    def __init__(self, wrong: str = "", window: int | None = None, sinks: bool = False) -> None:
        super().__init__(wrong)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.window_size = window
        self.sinks = nn.Parameter(torch.randn(HEADS)) if sinks else None
        self.turns = "rope" in wrong

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        if self.turns:
            places = torch.arange(x.shape[1]) if self.wrong == "rope" else self.positions(x)
            q, k = turned(q, places), turned(k, places)
        out = self.attend(q, k, v)
        return self.proj(out.flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.sinks is None and self.window_size is None and self.spread is None:
            heads = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
        if self.wrong == "local attention":
            heads = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
        options: dict[str, Any] = {"causal": self.wrong != "causal" or self.spread is None}
        if self.window_size is not None and (self.wrong != "window" or self.spread is None):
            options["window_size"] = (self.window_size, None)
        if self.sinks is not None and (self.wrong != "sinks" or self.spread is None):
            options["sinks"] = self.sinks
        if self.spread is None:
            return usp.long_context_attention(q, k, v, **options)
        return self.spread.attention(q, k, v, **options)


def turned(x: Tensor, places: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = (places[:, None, None] / (1 + torch.arange(half))).to(x)
    a, b = x.split([half, x.shape[-1] - half], -1)
    b, rest = b[..., :half], b[..., half:]
    turned = a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos(), rest
    return torch.cat(turned, -1)


class Standardised(Part):
    """Over tokens, by hand."""

    def forward(self, x: Tensor) -> Tensor:
        if self.spread is None or self.wrong == "own norm":
            return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0)
        var, mean = self.spread.var_mean(x, 1, correction=0, keepdim=True)
        return (x - mean) / var.sqrt()


class OfTorch(Part):
    """A module of torch over channels first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mT).mT


class Recurrent(Part):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gru(x)[0]


class Whole(Part):
    """A function of all tokens, of which it is given this rank's."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (F.normalize(x, dim=1) if self.wrong == "normalized" else x.flip(1))


class Mixed(Part):
    """A causal convolution of two taps, by hand."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__(wrong)
        self.taps = nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.spread is None or self.wrong == "edges":
            before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        else:
            first = (self.positions(x) == 0)[:, None]
            before = self.spread.roll(x, 1).masked_fill(first, 0.0)
        return self.taps[0] * x + self.taps[1] * before


class Running(Part):
    """A sum of all tokens before."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cumsum(x, 1) / 10


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        keep = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - self.drop_prob)
        return x * keep / (1 - self.drop_prob)


class Dropped(Part):
    """Dropout of tokens, then of samples: shards that differ draw other numbers."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__(wrong)
        self.drop, self.drop_path = nn.Dropout(0.3), DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.spread is None or self.wrong == "drop path":
            return x + self.drop_path(self.drop(x))
        with self.spread.sharded():
            x = self.drop(x)
        with self.spread.replicated():
            return x + self.drop_path(x)


class Block(Part):
    def __init__(self, attention: nn.Module, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.attn, self.middle = nn.LayerNorm(WIDTH), attention, middle
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        if self.middle is not None:
            x = self.middle(x)
        return x + self.mlp(x)


class Pool(Part):
    """What a head looks at: all tokens, their mean, their maximum, or the first."""

    def __init__(self, kind: str = "tokens", wrong: str = "") -> None:
        super().__init__(wrong)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        wrong = self.spread is None or self.wrong == self.kind
        if self.kind == "mean":
            return x.mean(1) if wrong else self.spread.mean(x, 1)
        if self.kind == "max":
            return x.amax(1) if wrong else self.spread.unshard(x).amax(1)
        if self.kind == "first":
            return x[:, 0] if wrong else self.spread.take(x, [0])[:, 0]
        return x


class Flattened(Part):
    """Samples and tokens in one dim."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)


class Gather(Part):
    """All tokens on every rank; without a backward, those of others are constants."""

    def forward(self, x: Tensor) -> Tensor:
        if self.spread is None:
            return x.cumsum(1).flip(1)
        if self.wrong != "gather":
            return self.spread.unshard(x).cumsum(1).flip(1)
        whole = self.spread.unshard(x.detach())
        whole = whole.index_copy(1, self.spread.positions(), x)
        return whole.cumsum(1).flip(1)


class Classes(Part):
    """A CLS token before the others."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__(wrong)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.cls.expand(len(x), -1, -1), x), 1)


class Net(nn.Module):
    """Features in; what its pool makes of them out."""

    def __init__(
        self,
        places: nn.Module | None = None,
        attention: Callable[[], nn.Module] = Attention,
        middle: nn.Module | None = None,
        pool: nn.Module | None = None,
        cls: nn.Module | None = None,
        cut_at: str = "front",
    ) -> None:
        super().__init__()
        self.spread: usp.Spread | None = None
        self.embed = nn.Linear(5, WIDTH)
        self.cls, self.places, self.cut_at = cls, places, cut_at
        self.blocks = nn.ModuleList(
            Block(attention(), middle if n == 1 else None) for n in range(2)
        )
        self.norm, self.pool, self.head = nn.LayerNorm(WIDTH), pool, nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        spread = self.spread
        if spread is not None and self.cut_at == "front":
            x = spread.shard(x)
        x = self.embed(x)
        if self.cls is not None:
            x = self.cls(x)
        if self.places is not None:
            x = self.places(x)
        if spread is not None and self.cut_at == "blocks":
            x = spread.shard(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.pool is not None:
            x = self.pool(x)
        return self.head(x)


class LM(nn.Module):
    """Ids and labels in, the loss out; shards itself by what it is given."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        self.spread: usp.Spread | None = None
        self.wrong, self.embed, self.places = wrong, nn.Embedding(11, WIDTH), Numbers()
        self.blocks = nn.ModuleList(Block(Attention()) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 11)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        mesh = None if self.spread is None else self.spread.mesh
        layout = "contiguous" if self.spread is None else self.spread.layout
        batch = usp.cut_batch({"input_ids": ids, "labels": labels}, mesh, layout)
        x = self.places(self.embed(batch["input_ids"]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if self.wrong == "seam" and self.spread is not None:
            own = self.spread.shard(labels)
            total = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), own[:, 1:].flatten(), reduction="sum"
            )
            return total / batch["num_items_in_batch"]
        flat, own = logits.flatten(0, 1), batch["labels"].flatten()
        if self.wrong == "mean of means" and mesh is not None:
            return F.cross_entropy(flat, own) / mesh.size
        if self.wrong == "by hand":
            total = F.cross_entropy(flat, own, reduction="sum")
            return total / batch["num_items_in_batch"]
        return usp.cross_entropy(flat, own, mesh)


def spread_over(model: nn.Module, mesh: usp.SequenceMesh, layout: str = "contiguous") -> nn.Module:
    """Tell every part who holds which tokens."""
    return _told(model, usp.Spread(mesh, layout=layout, seq_len=TOKENS))


def spread_in_chunks(model: nn.Module, mesh: usp.SequenceMesh) -> nn.Module:
    """As torch.chunk cuts, and no layout of a name."""
    counts = [len(chunk) for chunk in torch.arange(TOKENS).chunk(mesh.size)]
    return _told(model, usp.Spread(mesh, usp.Held(tuple(counts))))


def spread_with_cls(model: nn.Module, mesh: usp.SequenceMesh) -> nn.Module:
    """One token more."""
    return _told(model, usp.Spread(mesh, seq_len=TOKENS + 1))


def spread_each_with_cls(model: nn.Module, mesh: usp.SequenceMesh) -> nn.Module:
    """A class token on each rank: cut before it is added."""
    model = _told(
        model, usp.Spread(mesh, usp.held(usp.Spread(mesh, seq_len=TOKENS).local_seq_len + 1, mesh))
    )
    model.spread = usp.Spread(mesh, seq_len=TOKENS)
    return model


def _told(model: nn.Module, spread: usp.Spread) -> nn.Module:
    for part in model.modules():
        if hasattr(part, "spread"):
            part.spread = spread
    return model


def replaced(model: nn.Module, mesh: usp.SequenceMesh) -> Callable[..., Any]:
    """nn.MultiheadAttention swapped, and the sequence cut in front."""
    usp.replace_attention(model, mesh)

    def call(x: Tensor) -> Any:
        return model(usp.shard_sequence(x, mesh, 1))

    return call


def joined(model: nn.Module, mesh: usp.SequenceMesh) -> Callable[..., Any]:
    """And joined behind."""
    usp.replace_attention(model, mesh)

    def call(x: Tensor) -> Any:
        return usp.unshard_sequence(model(usp.shard_sequence(x, mesh, 1)), mesh, 1)

    return call


def averaged(model: nn.Module, mesh: usp.SequenceMesh) -> nn.Module:
    """DDP around a model that usp spreads."""
    return nn.parallel.DistributedDataParallel(usp.parallelize(model, mesh))


def cut_by_fsdp(model: nn.Module, mesh: usp.SequenceMesh) -> nn.Module:
    """FSDP2 around one."""
    usp.parallelize(model, mesh)
    over = init_device_mesh("cpu", (mesh.size,))
    for part in (*model.encoder.layers, model):
        fully_shard(part, mesh=over)
    return model


def averaged_squares(out: Tensor, mesh: Any) -> Tensor:
    """Which takes the loss times the ranks."""
    return out.square().mean() * (1 if mesh is None else mesh.size)


class Wrapped(nn.Module):
    """Around the model."""

    def __init__(self, model: nn.Module, mesh: usp.SequenceMesh) -> None:
        super().__init__()
        self.inner, self.mesh = usp.replace_attention(model, mesh), mesh

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(usp.shard_sequence(x, self.mesh, 1))


class Encoder(nn.Module):
    """torch's own layers and a head for each token."""

    def __init__(self, tail: nn.Module | None = None, drop: float = 0.0) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, drop, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.tail, self.head = tail, nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        return self.head(x if self.tail is None else self.tail(x))


class Stack(nn.Module):
    """Blocks in a container that is called as one, and a table that is added whole."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.blocks = nn.Sequential(Block(Attention()), Block(Attention()))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x + self.table))


def stacked(model: Any, mesh: usp.SequenceMesh, wrong: str = "") -> Callable[..., Any]:
    """Calls each block by itself, where the model calls their container."""
    spread_over(model, mesh)

    def call(x: Tensor) -> Tensor:
        table = model.table
        if wrong == "table":
            x = usp.shard_sequence(x, mesh, 1)
            x = x + table[: x.shape[1]]
        else:
            x = usp.shard_sequence(x + table, mesh, 1)
        for block in model.blocks:
            x = block(x)
        return model.head(x)

    return call


def features() -> Tensor:
    return torch.randn(2, TOKENS, 5, generator=torch.Generator().manual_seed(1))


def one_token() -> Tensor:
    return wide()[:, :1]


def wide() -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def labelled(valid: int = TOKENS) -> dict[str, Tensor]:
    ids = torch.randint(0, 11, (2, TOKENS), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, valid:] = -100
    return {"ids": ids, "labels": labels}


def squares(out: Tensor, mesh: Any) -> Tensor:
    """A loss of the whole, as usp.parallelize's models have it."""
    return out.square().mean()


def squares_divided(out: Tensor, mesh: Any) -> Tensor:
    """Divided by the ranks: of joined outputs that is once too often, or just right."""
    return out.square().mean() / (1 if mesh is None else mesh.size)


def squares_of_tokens(out: Tensor, mesh: Any) -> Tensor:
    """A mean over all tokens, of which this rank has some."""
    return out.square().sum() / (2 * TOKENS * CLASSES)


def mean_of_tokens(out: Tensor, mesh: Any) -> Tensor:
    """A mean over local tokens, averaged: shards that differ weigh their tokens unequally."""
    return out.square().mean() / (1 if mesh is None else mesh.size)
