"""What each page of the documentation takes for granted, and what its blocks must come to.

A story fills the page's names; a block runs at each ``yield``. ``yield "library: ..."`` leaves the
block out and says why. A page without a story gets ``usp`` and ``torch`` and has the rest itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import document_blocks
import torch
import torch.nn.functional as F
from document_blocks import Names, Story
from integration_models import F64, WIDTH, make_encoder
from pool import mesh
from torch import Tensor, nn

import usp


@dataclasses.dataclass(frozen=True)
class Told:
    story: Story
    shape: tuple[int, int] | None  # of the mesh: degrees of Ulysses and of the ring


STORIES: dict[str, Told] = {}


def page(name: str, shape: tuple[int, int] | None = None) -> Callable[[Story], Story]:
    def told(story: Story) -> Story:
        STORIES[name] = Told(story, shape)
        return story

    return told


def run_alone(name: str) -> list[str]:
    told = STORIES.get(name)
    return document_blocks.run(name, told and told.story)


def run_on_mesh(name: str) -> list[str]:
    """On each of four workers."""
    told = STORIES[name]
    assert told.shape is not None
    return document_blocks.run(name, told.story, mesh=mesh(*told.shape))


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


class Attention(nn.Module):
    """Attention as most models have it."""

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        heads = x.unflatten(-1, (4, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.temporal = Attention(), nn.Identity()
        self.mlp = nn.Linear(WIDTH, WIDTH, dtype=F64)

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        return x + self.mlp(self.temporal(self.attn(x, rope)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


# ---- what newcomers read


@page("README.md", (2, 2))
def readme(names: Names) -> Iterator[str | None]:
    yield None
    assert names["whole"].shape == (1, 1009, 8, 64)
    model = make_encoder()
    names.update(model=model, seq_len=1009, data_parallel_group=None)
    yield None
    weights = torch.cat([p.flatten() for p in model.parameters()])
    names["this_rank_token_losses"] = weights.square().sum() * torch.ones(3)
    yield None


@page("docs/extend/layout.md", (2, 2))
@page("docs/extend/mask.md", (2, 2))
@page("docs/extend/transport.md", (1, 4))
@page("docs/extend/backend.md", (2, 2))
@page("docs/extend/door.md", (2, 2))
@page("docs/tutorial.md", (2, 2))
def by_itself(names: Names) -> Iterator[str | None]:
    """It makes its own mesh, of the four processes that it says it needs."""
    yield None


# ---- attention


@page("docs/masks.md")
def masks(names: Names) -> Iterator[str | None]:
    names.update(zip("qkv", torch.randn(3, 2, 17, 4, 8), strict=True))
    yield None


@page("docs/rings.md", (1, 4))
def rings(names: Names) -> Iterator[str | None]:
    yield None
    here, proj = names["mesh"], nn.Linear(12, 4 * (8 + 6), bias=False)
    assert here.ring_outer_degree == 2
    given = torch.randn(2, 17, 4, 8 + 3), torch.randn(2, 17, 12), torch.randn(2, 17, 3)
    shards = (usp.shard_sequence(x, here, 1, "zigzag") for x in given)
    names.update(zip(("q", "latent", "rope_key"), shards, strict=True), kv_b_proj=proj)
    yield None
    found = usp.unshard_sequence(names["out"], here, 1, "zigzag", seq_len=17)
    same(found, usp.latent_attention(*given, names["up_k"], names["up_v"], causal=True))


@page("docs/decoding.md", (1, 4))
def decoding(names: Names) -> Iterator[str | None]:
    q, k, v = torch.randn(3, 2, 18, 4, 8)
    names.update(q=q[:, :17], k=k[:, :17], v=v[:, :17])
    names.update(new_q=q[:, 17:], new_k=k[:, 17:], new_v=v[:, 17:])
    whole = usp.long_context_attention(q, k, v, causal=True)
    yield None
    same(names["out"], whole[:, 17:])
    yield None
    assert names["out"].shape == (2, 1, 4, 6)
    assert names["several"].k.shape[0] == 3
    yield None
    found = usp.unshard_sequence(names["out"], names["mesh"], 1, "zigzag", seq_len=17)
    same(found, whole[:, :17])


@page("docs/dsp.md", (2, 2))
def dsp(names: Names) -> Iterator[str | None]:
    names.update(video=torch.randn(2, 3, 5, 32), text=torch.randn(2, 4, 12))
    yield None
    assert names["out"].shape == (2, 3, 5, 32)
    yield None


@page("docs/linear_attention.md", (2, 2))
def linear_attention(names: Names) -> Iterator[str | None]:
    here, x, decay = names["mesh"], torch.randn(2, 5, 2, 3), -torch.ones(2)
    names.update(dict.fromkeys("qkv", usp.shard_sequence(x, here, 1)), decay=decay)
    yield None
    found = usp.unshard_sequence(names["out"], here, 1, seq_len=5)
    same(found, usp.linear_attention(x, x, x, decay))
    weight, bias = torch.randn(6, 4), torch.randn(6)
    names.update(weight=weight, bias=bias, x=names["q"])
    yield None
    found = usp.unshard_sequence(names["mixed"], here, 1, seq_len=5)
    same(found, F.silu(usp.causal_conv1d(x.flatten(2), weight, bias)))
    names["x"] = x
    yield None
    assert names["out"].shape == x.shape


@page("docs/spread.md", (2, 2))
def spread(names: Names) -> Iterator[str | None]:
    here, layout, n = names["mesh"], "zigzag", 13
    x = usp.shard_sequence(torch.randn(2, n, WIDTH), here, 1, layout)
    names.update(x=x, layout=layout, n=n, F=F, w=(0.5, 2.0), eps=1e-5)
    names.update(head=nn.Linear(WIDTH, 3), labels=torch.tensor([0, 2]))
    yield None
    assert names["loss"].isfinite() and names["x"].shape == x.shape
    names.update(text=torch.randn(1, 7, WIDTH), image=torch.randn(1, 25, WIDTH))
    names["qkv"] = lambda y: (y.unflatten(-1, (4, 3)),) * 3
    yield None
    assert names["text_out"].shape[1] == len(usp.positions(7, here))
    q = usp.shard_sequence(torch.randn(1, n, 4, 3), here, 1, layout)
    k = torch.ones(1, 77 if here.rank == 0 else 0, 4, 3)
    names.update(q=q, k=k, v=k)
    yield None
    assert names["out"].shape == q.shape
    yield None
    model = SimpleNamespace(mesh=here, table=torch.randn(n, WIDTH), blocks=[lambda x, spread: x])
    model.head = nn.Identity()
    whole = torch.randn(2, n, WIDTH)
    same(names["forward"](model, whole), whole[:, :1] + model.table[:1])


# ---- models and training


def _training_step(names: Names) -> None:
    model = nn.Linear(WIDTH, 5)
    x = usp.shard_sequence(torch.randn(2, 13, WIDTH), names["mesh"], 1)
    logits = model(x).flatten(0, 1)
    targets = torch.zeros(len(logits), dtype=torch.long)
    names.update(F=F, model=model, logits=logits, targets=targets, global_count=26)
    names.update(optimizer=torch.optim.SGD(model.parameters(), 0.1), loss=logits.square().sum())


@page("docs/training.md", (2, 2))
def training(names: Names) -> Iterator[str | None]:
    here = names["mesh"]
    _training_step(names)
    yield None
    _training_step(names)
    names["scaler"] = torch.amp.GradScaler("cpu")
    yield None
    _training_step(names)
    names["DistributedDataParallel"] = nn.parallel.DistributedDataParallel
    names["loss"] = SimpleNamespace()  # the loss of the model that the block wraps
    yield "GPU: of eight devices; tests/nn/test_training.py runs DDP and FSDP2 with gloo"
    yield "GPU: of eight devices; tests/nn/test_training.py runs DDP and FSDP2 with gloo"
    q = torch.randn(1, 5, 2, 3, requires_grad=True)
    names.update(x=q, partial=functools.partial, block=_attention_of(here))
    yield None
    names["x"].sum().backward()
    assert q.grad is not None
    names.update(x=torch.randn(2, 3), drop_path=F.dropout, branch=torch.neg, F=F)
    names["self"] = SimpleNamespace(training=True)
    yield None
    names.update(seq_len=13, layout="zigzag", device="cpu", position_table=torch.randn(13, 4))
    x = usp.shard_sequence(torch.randn(13, 4), here, 0, "zigzag")
    names.update(x=x, q=x, k=x, rope=lambda x, positions: x * positions[:, None])
    yield None
    yield from _table_cut_by_position(names)
    cu_seqlens, total = (0, 6, 13), 13
    layout = usp.DocumentZigzag(cu_seqlens)
    names.update(cu_seqlens=cu_seqlens, tokens=torch.arange(total)[None])
    names["targets"] = names["tokens"] + 1
    q = usp.shard_sequence(torch.randn(1, total, 2, 3), here, 1, layout)
    names.update(q=q, k=q, v=q)
    yield None
    assert names["tokens"][0].tolist() == names["positions"].tolist()


def _attention_of(here: usp.SequenceMesh) -> Callable[[Tensor], Tensor]:
    return lambda x: usp.long_context_attention(x, x, x, here, seq_len=20)


def _kept(model: nn.Module, rows: nn.Parameter) -> nn.Parameter:
    model.register_parameter("rows", rows)
    return rows


def _table_cut_by_position(names: Names) -> Iterator[str | None]:
    here, model = names["mesh"], nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    q = usp.shard_sequence(torch.randn(1, 13, 2, 3), here, 1, "zigzag")
    x = usp.shard_sequence(torch.randn(1, 13, 4), here, 1, "zigzag")
    names.update(table=torch.randn(13, 4), model=model, data_parallel_group=None)
    names["nn"] = SimpleNamespace(Parameter=lambda table: _kept(model, nn.Parameter(table)))
    names.update(x=x, q=q, k=q, v=q)
    names["loss"] = SimpleNamespace(backward=lambda: names["x"].sum().backward())
    yield None
    yield None
    norm = torch.cat(
        [names["rows"].grad.flatten(), *(p.grad.flatten() for p in model.parameters())]
    )
    assert norm.norm() <= 1.0


@page("docs/doors.md", (2, 2))
def doors(names: Names) -> Iterator[str | None]:
    whole = torch.randn(2, 13, WIDTH, dtype=F64)
    names.update(model=make_encoder(), images=whole, labels=whole, criterion=F.mse_loss)
    yield None
    names["model"] = Blocks()
    for block in names["model"].blocks:
        block.attn.requires_grad_(False)
    yield None
    yield None
    for _ in range(3):
        yield "library: transformers; tests/integrations/test_transformers_local.py runs such steps"
    model = Blocks()
    names.update(model=model, x=whole)
    yield None
    same(names["x"], model(whole))
    names.update(checkpoint=torch.utils.checkpoint.checkpoint, block=model.blocks[0])
    names["x"] = names["spread"].shard(whole).requires_grad_()
    yield None
    names["x"].sum().backward()
    yield "library: transformers; tests/integrations/test_transformers.py"
    yield "library: diffusers; tests/integrations/test_diffusers.py"


@page("docs/migration.md", (2, 2))
def migration(names: Names) -> Iterator[str | None]:
    q, k, v = torch.randn(3, 1, 4, 17, 8)
    names.update(q=q, k=k, v=v, F=F)
    yield "elsewhere: torch's own, beside ours in tests/integrations/test_migration.py"
    yield None
    same(names["whole"], F.scaled_dot_product_attention(q, k, v))


@page("docs/tiles.md", (2, 2))
def tiles(names: Names) -> Iterator[str | None]:
    mlp = nn.Sequential(nn.Linear(WIDTH, 5), nn.GELU(), nn.Linear(5, WIDTH))
    x = torch.randn(2, 13, WIDTH)
    names.update(self=SimpleNamespace(mlp=mlp, norm=nn.LayerNorm(WIDTH)), x=x)
    yield None
    same(names["x"], x + mlp(names["self"].norm(x)))
    yield "library: timm or transformers; tests/integrations/test_replace_mlp.py"
    yield "library: transformers; tests/integrations/test_replace_mlp.py"


@page("docs/degrees.md", (1, 4))
def degrees(names: Names) -> Iterator[str | None]:
    x, cuts, qkv = torch.randn(1, 301, 512), (0, 250, 260, 301), nn.Linear(512, 3 * 512)
    names.update(x=x, target=x, qkv=qkv, cu_seqlens=cuts)
    yield None
    q, k, v = qkv(x).unflatten(-1, (3, 8, 64)).unbind(2)
    out = usp.long_context_attention(q, k, v, causal=True, cu_seqlens=cuts).flatten(2)
    same(names["schedule"].unshard(names["x"], 1), x + out)


# ---- run elsewhere


@page("docs/recipes.md")
def recipes(names: Names) -> Iterator[str | None]:
    for library in ("accelerate", "Lightning", "Lightning", "DeepSpeed"):
        yield f"library: {library}; tests/integrations/test_recipes.py runs this very text"


@page("docs/backends.md")
def backends(names: Names) -> Iterator[str | None]:
    yield "library: kernels, and a GPU for what it loads; the loader: tests/backends/library"


@page("docs/design.md")
def design(names: Names) -> Iterator[str | None]:
    for _ in range(2):
        yield "excerpt: of usp/attention/ring.py, which every test of a ring runs"


@page("docs/verify.md")
def verify(names: Names) -> Iterator[str | None]:
    yield "elsewhere: it starts processes; tests/verification/test_processes.py"
