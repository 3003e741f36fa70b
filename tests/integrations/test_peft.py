"""LoRA on attention that has been replaced, and replaced attention under LoRA."""

from __future__ import annotations

import copy

import libraries
import pytest
import torch
from integration_models import F64, WIDTH, make_encoder, random
from torch import nn

import usp


@pytest.mark.parametrize("kdim", [None, 5])
def test_the_flag_of_packed_projections_is_honest(kdim) -> None:
    """PEFT reads it, and many a state-dict converter."""
    theirs = nn.MultiheadAttention(8, 2, kdim=kdim)
    replaced = copy.deepcopy(theirs)
    usp.replace_attention(replaced)
    for ours in (
        usp.MultiheadAttention(8, 2, kdim=kdim),
        usp.MultiheadAttention.from_torch(theirs),
        replaced,
        copy.deepcopy(replaced),
    ):
        assert ours._qkv_same_embed_dim is theirs._qkv_same_embed_dim is (kdim is None)
        ours._reset_parameters()
        assert ours._qkv_same_embed_dim is (kdim is None)
        assert (ours.in_proj_weight is None) is (kdim is not None)


@pytest.mark.library
@pytest.mark.parametrize("first", ["peft", "usp"])
@pytest.mark.parametrize("training", [True, False])
def test_lora(monkeypatch, first, training) -> None:
    peft = libraries.library("peft")
    config = peft.LoraConfig(target_modules=["self_attn"], r=2, init_lora_weights=False)
    theirs, ours = make_encoder(), make_encoder()
    theirs = peft.get_peft_model(theirs, config)
    if first == "usp":
        ours = peft.get_peft_model(usp.replace_attention(ours), config)
    else:
        ours = usp.replace_attention(peft.get_peft_model(ours, config))
    ours.load_state_dict(theirs.state_dict())
    x, results = random(2, 7, WIDTH, seed=1), []
    for model in (theirs, ours):
        model.train(training)
        # torch's fused path knows nothing of LoRA
        monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", model is ours)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        out = model(x)
        grads = torch.autograd.grad(out, list(parameters.values()), random(*out.shape, seed=2))
        results.append({"out": out.detach()} | dict(zip(parameters, grads, strict=True)))
    assert sum(isinstance(m, usp.MultiheadAttention) for m in ours.modules()) == 2
    assert any("lora" in name for name in results[0]) and x.dtype == F64
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-9, atol=1e-9)
