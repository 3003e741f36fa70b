"""Vision transformers of timm and torchvision, tiny and random."""

from __future__ import annotations

from typing import Any

import doors
import libraries
from torch import nn

TINY = {"img_size": 40, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2}
TINY |= {"num_classes": 5}
PLAIN = "vit_tiny_patch16_224"
# 25 patches and prefix tokens: neither tokens nor heads divide
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": (PLAIN, {}),
    "registers, mean": (PLAIN, {"reg_tokens": 4, "global_pool": "avg", "qk_norm": True}),
    "attention pooling": (PLAIN, {"class_token": False, "global_pool": "map"}),
    "layer scale, gates": (PLAIN, {"init_values": 0.5}),
    "rotations": ("eva02_tiny_patch14_224", {}),
    "rotations and registers": ("vit_small_patch16_dinov3", {}),
    "learned rotations, gates": ("vit_small_patch16_rope_mixed_224", {}),
    "tables of relative positions": ("vit_relpos_small_patch16_224", {}),
    "relative positions": ("beit_base_patch16_224", {}),
}


def of_timm(kind: str, again: bool = False, **more: Any) -> nn.Module:
    name, options = TIMM[kind]
    model = libraries.library("timm").create_model(name, **TINY, **options, **more)
    for block in model.blocks if "gates" in kind else ():
        block.attn.gate = nn.Linear(24, 24)  # no model of theirs has them yet
    model = doors.randomize(model).eval()
    model.set_grad_checkpointing(again)
    return model


def of_torchvision() -> nn.Module:
    vision = libraries.library("torchvision.models")
    return doors.randomize(vision.VisionTransformer(40, 8, 2, 3, 24, 48, num_classes=5)).eval()
