"""Models of transformers that the doors know, tiny and random, and what they take."""

from __future__ import annotations

from typing import Any

import doors
import libraries
import torch
from integration_models import random
from torch import nn

from usp.integrations import transformers as door

TOKENS = 27
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
SIZES |= {"intermediate_size": 64}
LM = SIZES | {"num_key_value_heads": 3, "head_dim": 8, "vocab_size": 61, "pad_token_id": 0}
VISION = SIZES | {"image_size": 40, "patch_size": 8}
TEXT = SIZES | {"vocab_size": 61, "max_position_embeddings": TOKENS, "eos_token_id": 60}
TEXT |= {"bos_token_id": 59, "pad_token_id": 0}
MLA = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 61}
MLA |= {"num_key_value_heads": 6, "intermediate_size": 64, "pad_token_id": 0}
MLA |= {"q_lora_rank": 20, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
MLA |= {"v_head_dim": 6, "first_k_dense_replace": 1, "moe_intermediate_size": 24}
MLA |= {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT": ("ViTConfig", "ViTModel", VISION),
    "DINOv3": ("DINOv3ViTConfig", "DINOv3ViTModel", VISION | {"num_register_tokens": 4}),
    "CLIP vision": ("CLIPVisionConfig", "CLIPVisionModel", VISION),
    "SigLIP vision": ("SiglipVisionConfig", "SiglipVisionModel", VISION),
    "CLIP text": ("CLIPTextConfig", "CLIPTextModel", TEXT),
    "SigLIP text": ("SiglipTextConfig", "SiglipTextModel", TEXT),
    "CLIP": (
        "CLIPConfig",
        "CLIPModel",
        {"text_config": TEXT, "vision_config": VISION, "projection_dim": 20},
    ),
    "SigLIP": (
        "SiglipConfig",
        "SiglipModel",
        {"text_config": TEXT | {"projection_size": 48}, "vision_config": VISION},
    ),
    "BERT": ("BertConfig", "BertForTokenClassification", SIZES | {"vocab_size": 61}),
    "Llama": ("LlamaConfig", "LlamaForCausalLM", LM),
    "Qwen3": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        LM | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "Gemma 2": (  # of its published size
        "Gemma2Config",
        "Gemma2ForCausalLM",
        LM | {"sliding_window": 7, "head_dim": 256},
    ),
    "Gemma 3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        LM | {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        LM | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "DeepSeek-V3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", MLA),
}
# keys of 128 and 64 features and values of 128, as the published models have them
FULL = MLA | {"num_attention_heads": 3, "num_key_value_heads": 3, "v_head_dim": 128}
FULL |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
MORE = {
    "DeepSeek-V3 at 192 / 128": (*MODELS["DeepSeek-V3"][:2], FULL),
    "DeepSeek-V2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", MLA),
    "GLM-4.7-Flash": ("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", MLA),
}
OF_EXPERTS = ("gpt-oss", "DeepSeek-V3", *MORE)
OF_IMAGES = ("ViT", "DINOv3", "CLIP vision", "SigLIP vision")


def model_of(kind: str, implementation: str = "usp") -> nn.Module:
    library = libraries.library("transformers")
    door.register()
    config, name, options = (MODELS | MORE)[kind]
    config = getattr(library, config)(**options, use_cache=False)
    torch.manual_seed(0)
    model = getattr(library, name)._from_config(config, attn_implementation=implementation)
    model = doors.randomize(model).eval()
    if kind in OF_EXPERTS:
        model.set_experts_implementation("eager")
    return model


def inputs_of(kind: str, padding: str | None) -> dict[str, Any]:
    images = {"pixel_values": random(2, 3, 40, 40, seed=1)}
    if kind in OF_IMAGES:
        return images
    ids = torch.randint(1, 61, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    if "CLIP" in kind or "SigLIP" in kind:
        ids.clamp_(max=58)[:, 19] = TEXT["eos_token_id"]  # CLIP reads the output of this one
    if kind in ("CLIP", "SigLIP"):
        inputs |= images | {"return_loss": True}
    if padding is None:
        return inputs
    real = torch.ones(2, TOKENS, dtype=torch.int64)
    if padding == "right":
        real[1, 20:] = 0
    else:
        real[1, :5] = 0
    return inputs | {"attention_mask": real}
