"""Language models of transformers whose logits stay cut, by their own loss and by ours."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import doors
import libraries
import pool as workers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import usp
from usp.integrations import transformers as door

pytestmark = pytest.mark.library
MESHES = [(1, 2), (2, 1), (2, 2)]
TOKENS = 27
DOCUMENTS = (0, 10, 11, 20, 27)
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 61}
SIZES |= {"intermediate_size": 64, "num_key_value_heads": 3, "head_dim": 8, "pad_token_id": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", SIZES),
    "Qwen3": ("Qwen3", SIZES | {"use_sliding_window": True, "sliding_window": 7}),
    "Gemma2": ("Gemma2", SIZES | {"sliding_window": 7}),
    "GptOss": (
        "GptOss",
        SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
}


def model_of(kind: str) -> nn.Module:
    library = libraries.library("transformers")
    door.register()
    name, options = MODELS[kind]
    config = getattr(library, f"{name}Config")(**options, use_cache=False)
    config._attn_implementation = "usp"
    torch.manual_seed(0)
    model = getattr(library, f"{name}ForCausalLM")(config)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products know no fp64
    return doors.randomize(model).train()


def batch_of(what: str) -> dict[str, Tensor]:
    ids = torch.randint(1, 61, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids.clone()}
    if what == "padding":
        batch["attention_mask"] = torch.ones(2, TOKENS, dtype=torch.int64)
        batch["attention_mask"][1, 20:] = 0
        batch["labels"][1, 20:] = -100
        batch["labels"][0, :14] = -100  # ranks without a label
    if what == "documents":
        pieces = [torch.arange(b - a) for a, b in itertools.pairwise(DOCUMENTS)]
        batch["position_ids"] = torch.cat(pieces).expand(2, -1).contiguous()
        batch["labels"][:, list(DOCUMENTS[:-1])] = -100  # as their collator does it
    return batch


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """In fp64, where theirs is in fp32."""
    given = {n: x for n, x in batch.items() if "labels" not in n and n != "num_items_in_batch"}
    logits = model(**given).logits.flatten(0, 1)
    total = F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum")
    return total / batch["num_items_in_batch"]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    return {name: grad for name, grad in found.items() if grad is not None}


def whole_loss(model: nn.Module, batch: dict[str, Tensor], kind: str) -> Tensor:
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    given = {name: x for name, x in batch.items() if name != "labels"}
    if "position_ids" in batch and kind == "GptOss":  # theirs does not part documents
        pieces = [slice(a, b) for a, b in itertools.pairwise(DOCUMENTS)]
        logits = torch.cat([model(batch["input_ids"][:, p]).logits for p in pieces], 1)
    else:
        logits = model(**given).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _compared(
    mesh: tuple[int, int], layout: str, kind: str, what: str, averaged: bool
) -> dict[str, float]:
    placed, model, batch = workers.mesh(*mesh), model_of(kind), batch_of(what)
    ours = usp.parallelize(copy.deepcopy(model), placed, outputs="local")
    wanted = whole_loss(model, batch, kind)
    wanted.backward()
    cut = usp.cut_batch(batch, placed, layout)
    assert set(torch.unique(cut["labels"]).tolist()) <= {-100, *range(61)}
    if averaged:
        wrapped = DistributedDataParallel(ours)  # one that nobody keeps reduces nothing
        (loss_of(wrapped, cut) * placed.size).backward()
    else:
        loss_of(ours, cut).backward()
        usp.all_reduce_gradients(ours, placed)
    wrong = doors.errors(gradients(model), gradients(ours))
    out = ours(**cut)  # their own line
    assert out.logits.shape[1] == cut["spread"].local_seq_len
    value = out.loss.detach().double()
    torch.distributed.all_reduce(value)
    if abs(value - wanted) > 1e-5:
        wrong["their own loss"] = (value - wanted).item()
    loose = 3e-6 if kind == "Gemma2" else 1e-9
    return {name: error for name, error in wrong.items() if not abs(error) <= loose}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("what", ["plain", "padding", "documents"])
def test_llama_has_every_gradient_of_the_whole(pool, mesh, layout, what) -> None:
    averaged = what == "plain" and layout == "zigzag"
    args = mesh, layout, "Llama", what, averaged
    for wrong in pool.run(_compared, *args, ranks=mesh[0] * mesh[1]):
        assert wrong == {}


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "Llama"])
@pytest.mark.parametrize("what", ["padding", "documents"])
def test_windows_softcap_and_sinks(pool, kind, what) -> None:
    for wrong in pool.run(_compared, (2, 2), "zigzag", kind, what, False, ranks=4):
        assert wrong == {}


def _again(reentrant: bool) -> dict[str, float]:
    mesh, model, batch = workers.mesh(1, 2), model_of("Llama"), batch_of("documents")
    ours = usp.parallelize(copy.deepcopy(model), mesh, outputs="local")
    whole_loss(model, batch, "Llama").backward()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss_of(ours, usp.cut_batch(batch, mesh, "zigzag")).backward()
    usp.all_reduce_gradients(ours, mesh)
    return doors.errors(gradients(model), gradients(ours))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_theirs(pool, reentrant) -> None:
    for wrong in pool.run(_again, reentrant, ranks=2):
        assert wrong == {}


def test_one_device_is_the_same_program() -> None:
    model, batch = model_of("Llama"), batch_of("padding")
    ours = usp.parallelize(copy.deepcopy(model), None, outputs="local")
    cut = usp.cut_batch(batch, None, cu_seqlens=DOCUMENTS)
    logits = ours(**cut).logits
    pieces = [slice(a, b) for a, b in itertools.pairwise(DOCUMENTS)]
    masks = batch["attention_mask"]
    apart = [model(batch["input_ids"][:, p], attention_mask=masks[:, p]).logits for p in pieces]
    real = masks.bool()
    torch.testing.assert_close(logits[real], torch.cat(apart, 1)[real])
