"""DeepSeek's latent attention through the door of transformers: latents travel, and are kept."""

from __future__ import annotations

from typing import Any

import doors
import libraries
import pool as workers
import pytest
import torch
from torch import Tensor, nn
from transformers_models import FULL, inputs_of, model_of

import usp
from usp.integrations import transformers as door
from usp.testing.wire import WireBytes

pytestmark = pytest.mark.library


def _sent(kind: str, implementation: str) -> int:
    mesh, model = workers.mesh(1, 2), model_of(kind, implementation)
    usp.parallelize(model, mesh)
    model(**inputs_of(kind, None))  # what is planned once is planned
    with torch.no_grad(), WireBytes() as wire:
        model(**inputs_of(kind, None))
    return wire.sent


def test_latents_are_on_the_wire_and_not_keys(pool) -> None:
    libraries.library("transformers")
    kind = "DeepSeek-V3 at 192 / 128"
    keys, latents = (pool.run(_sent, kind, how, ranks=2) for how in ("sdpa", "usp"))
    # there queries of 3 heads travel, as these are less than keys
    assert sum(latents) * 3 < sum(keys)


def _others(kind: str, padding: str | None) -> dict[str, float]:
    mesh, model = workers.mesh(2, 2), Logits(model_of(kind))
    inputs = inputs_of(kind, padding)
    wrong = doors.compared(model, inputs, mesh, lambda m: usp.parallelize(m.model, mesh))
    return {name: error for name, error in wrong.items() if not error <= 3e-6}  # parts in fp32


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("kind", ["DeepSeek-V2", "GLM-4.7-Flash"])
def test_other_models_of_latents(pool, kind, padding) -> None:
    libraries.library("transformers")
    for wrong in pool.run(_others, kind, padding, ranks=4):
        assert wrong == {}


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits if attention_mask is None else logits[attention_mask.bool()]


def adapted(training: bool) -> Any:
    """With LoRA beside the weight that makes keys and values."""
    peft = libraries.library("peft")
    config = peft.LoraConfig(target_modules=["kv_b_proj"], r=2, init_lora_weights=False)
    return doors.randomize(peft.get_peft_model(model_of("DeepSeek-V3"), config)).train(training)


def _adapted(training: bool) -> dict[str, float]:
    mesh, model = workers.mesh(1, 2), Logits(adapted(training))

    def spread(wrapped: nn.Module) -> None:
        usp.parallelize(wrapped.model, mesh, layout="zigzag")

    wrong = doors.compared(model, inputs_of("DeepSeek-V3", None), mesh, spread)
    return {name: error for name, error in wrong.items() if not error <= 3e-6}  # parts in fp32


@pytest.mark.parametrize("training", [True, False])
def test_an_adapter_beside_the_weight_counts(pool, training) -> None:
    libraries.library("peft")
    for wrong in pool.run(_adapted, training, ranks=2):
        assert wrong == {}


def _generated(is_spread: bool) -> Tensor:
    mesh, model = workers.mesh(1, 2), adapted(False)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    if is_spread:
        usp.parallelize(model, mesh)
        options["cache"] = door.sharded_cache(mesh)
    text = model.generate(**inputs_of("DeepSeek-V3", None), **options)
    if is_spread:
        (layer, _), width = options["cache"].layers, FULL["kv_lora_rank"] + 4
        assert layer.held.k.shape[2:] == (1, width)
    return text


def test_an_adapter_generates(pool) -> None:
    libraries.library("peft")
    for found in pool.run(_generated, True, ranks=2):
        assert torch.equal(found, pool.run(_generated, False, ranks=2)[0])
