"""Stories of the pages on models and training: see ``document_pages.py``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from document_blocks import Names, page, same
from integration_models import F64, WIDTH, make_encoder
from torch import Tensor, nn

import usp


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
    yield from _language_model(names)
    model = Blocks()
    names.update(model=model, x=whole)
    yield None
    same(names["x"], model(whole))
    names.update(checkpoint=torch.utils.checkpoint.checkpoint, block=model.blocks[0])
    names["x"] = names["spread"].shard(whole).requires_grad_()
    yield None
    names["x"].sum().backward()
    if not names.get("libraries"):
        yield "library: transformers; run by make test-doors"
    else:
        import transformers_models as models
        from transformers import AutoModelForCausalLM, LlamaConfig

        config, ids = LlamaConfig(**models.LM), models.inputs_of("Llama", None)["input_ids"]
        names.update(AutoModelForCausalLM=AutoModelForCausalLM, config=config, ids=ids)
        yield None
        assert names["loss"].isfinite()
    yield "shortened: of diffusers; tests/integrations/test_diffusers.py"


def _batch(models: Any) -> dict[str, Tensor]:
    ids = models.inputs_of("Llama", None)["input_ids"]
    return {"input_ids": ids, "labels": ids.clone()}


def _language_model(names: Names) -> Iterator[str | None]:
    if not names.get("libraries"):
        for _ in range(2):
            yield "library: transformers; run by make test-doors"
    else:
        import transformers_models as models

        names.update(model=models.model_of("Llama"), batch=_batch(models))
        whole = names["model"](**names["batch"]).loss.detach()
        yield None
        parts = names["loss"].detach().clone()
        for axis in (names["mesh"].ulysses, names["mesh"].ring):
            axis.all_reduce(parts)
        same(parts, whole)
        theirs = names["model"]
        names["model"] = lambda ids, positions, spread: (
            theirs(input_ids=ids, position_ids=positions, spread=spread).logits
        )
        names["F"] = F
        yield None
        assert names["loss"].isfinite()
    yield "shortened: of transformers; tests/integrations/test_transformers_trainer.py"


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
    if not names.get("libraries"):
        for _ in range(3):
            yield "library: transformers; run by make test-doors"
        return
    import transformers_models as models

    for _ in range(2):
        names["model"] = models.model_of("Llama")
        yield None
    names.update(model=models.model_of("Llama"), batch=_batch(models))
    yield None
    assert names["loss"].isfinite()


@page("docs/degrees.md", (1, 4))
def degrees(names: Names) -> Iterator[str | None]:
    x, cuts, qkv = torch.randn(1, 301, 512), (0, 250, 260, 301), nn.Linear(512, 3 * 512)
    names.update(x=x, target=x, qkv=qkv, cu_seqlens=cuts)
    yield None
    q, k, v = qkv(x).unflatten(-1, (3, 8, 64)).unbind(2)
    out = usp.long_context_attention(q, k, v, causal=True, cu_seqlens=cuts).flatten(2)
    same(names["schedule"].unshard(names["x"], 1), x + out)
