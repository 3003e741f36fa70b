"""usp.verify says nothing of models of libraries that are spread rightly, and names a fault."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import libraries
import pool as workers
import pytest
import torch
from torch import Tensor, nn

import usp
from usp.integrations import transformers as door
from usp.verification.job import Job, random_module, run_sharded
from usp.verification.record import Record
from usp.verification.verdict import judged
from usp.verification.verify import places_of, whole_of

pytestmark = pytest.mark.library
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
SIZES |= {"intermediate_size": 64}
LM = SIZES | {"num_key_value_heads": 3, "head_dim": 8, "vocab_size": 61, "pad_token_id": 0}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT": ("ViTConfig", "ViTModel", SIZES | {"image_size": 40, "patch_size": 8}),
    "BERT": ("BertConfig", "BertForTokenClassification", SIZES | {"vocab_size": 61}),
    "Llama": ("LlamaConfig", "LlamaForCausalLM", LM),
    "Qwen3": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        LM | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "Gemma 2": ("Gemma2Config", "Gemma2ForCausalLM", LM | {"sliding_window": 7}),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        LM | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
}


def of_transformers(kind: str) -> nn.Module:
    library = libraries.library("transformers")
    door.register()
    config, name, options = TRANSFORMERS[kind]
    made = getattr(library, config)(**options, use_cache=False)
    made._attn_implementation = "usp"
    model = getattr(library, name)(made)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products know no fp64
    return model.train()


def of_timm(**options: Any) -> nn.Module:
    libraries.library("timm")
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 40, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2}
    return VisionTransformer(**(sizes | {"num_classes": 7} | options)).train()


def of_torchvision() -> nn.Module:
    libraries.library("torchvision")
    from torchvision.models import VisionTransformer

    return VisionTransformer(40, 8, 2, 3, 24, 48, dropout=0.1, num_classes=7).train()


def images() -> Tensor:
    return torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))


def ids(padded: bool = False, labels: bool = False) -> dict[str, Tensor]:
    found = torch.randint(1, 61, (2, 27), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": found}
    if padded:
        batch["attention_mask"] = torch.ones(2, 27, dtype=torch.int64)
        batch["attention_mask"][1, 20:] = 0
    if labels:
        batch["labels"] = found.clone()
    return batch


def local(model: nn.Module, mesh: usp.SequenceMesh, layout: str = "zigzag") -> Callable[..., Any]:
    """Logits stay cut; the loss is theirs."""
    usp.parallelize(model, mesh, outputs="local")

    def call(**batch: Tensor) -> Tensor:
        return model(**usp.cut_batch(batch, mesh, layout)).loss

    return call


def cut_too_early(model: nn.Module, mesh: usp.SequenceMesh) -> Callable[..., Any]:
    """Labels are cut, and then the model shifts them."""
    usp.parallelize(model, mesh, outputs="local")

    def call(**batch: Tensor) -> Tensor:
        cut = usp.cut_batch(batch, mesh)
        count = cut["num_items_in_batch"]
        given = {n: x for n, x in cut.items() if n not in ("labels", "shift_labels")}
        labels = cut["spread"].shard(batch["labels"])
        return model(**(given | {"labels": labels, "num_items_in_batch": count})).loss

    return call


def loss_alone(out: Any, mesh: Any) -> Tensor:
    """One device returns more than the loss."""
    return out if isinstance(out, Tensor) else out.loss


class Loss(nn.Module):
    """The model's loss and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Tensor:
        return self.model(**batch).loss


def inner_local(model: nn.Module, mesh: usp.SequenceMesh) -> Callable[..., Any]:
    return local(model.model, mesh)


def inner_too_early(model: nn.Module, mesh: usp.SequenceMesh) -> Callable[..., Any]:
    return cut_too_early(model.model, mesh)


CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "timm": (of_timm, images, {}),
    "timm, DropPath": (functools.partial(of_timm, drop_path_rate=0.5), images, {}),
    "timm, dropout, registers": (
        functools.partial(of_timm, proj_drop_rate=0.2, reg_tokens=4, qk_norm=True), images, {},
    ),
    "torchvision": (of_torchvision, images, {}),
    **{
        kind: (functools.partial(of_transformers, kind), ids if kind != "ViT" else images, {})
        for kind in TRANSFORMERS
    },
    "Llama, padded": (
        functools.partial(of_transformers, "Llama"), functools.partial(ids, True, True), {},
    ),
    "Llama, local": (
        lambda: Loss(of_transformers("Llama")),
        functools.partial(ids, False, True),
        {"sharded": inner_local, "layout": "zigzag"},
    ),
}  # fmt: skip


def _on_rank(given: bytes, shapes: list[tuple[int, ...]]) -> Record:
    for name in ("timm", "transformers"):
        libraries.library(name)
    job = pickle.loads(given)
    return run_sharded(job, workers.mesh(*job.mesh_shape), shapes)


def verified(
    pool: Any, model: nn.Module, inputs: Any, mesh: tuple[int, int], **options: Any
) -> usp.Verification:
    given = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    job, whole = whole_of(Job(model, given, mesh, **options))
    assert random_module(job, whole) is None
    shapes = [tuple(x.shape) for x in whole.outputs]
    ranks = mesh[0] * mesh[1]
    outcomes = pool.run(_on_rank, job.to_bytes(), shapes, ranks=ranks)
    return judged(job.model, whole, outcomes, places_of(job), job.run_dtype())


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_said_of_what_is_right(pool, name) -> None:
    make, inputs, options = CASES[name]
    torch.manual_seed(0)
    found = verified(pool, make(), inputs(), (1, 2), **options)
    assert found, str(found)


def test_labels_that_are_cut_and_then_shifted_are_named(pool) -> None:
    torch.manual_seed(0)
    model = Loss(of_transformers("Llama"))
    found = verified(pool, model, ids(labels=True), (1, 2), sharded=inner_too_early)
    assert not found and "labels shifted at a seam" in found.cause, str(found)
