"""Transformers of diffusers, tiny and random, in fp64, and what they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import doors
import libraries
import torch
from integration_models import random
from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Any]]


@contextmanager
def fp64() -> Iterator[None]:
    """What these models compute in fp32, whatever their dtype, is in fp64."""
    with mock.patch.object(Tensor, "float", Tensor.double):
        yield


def _model(name: str, **sizes: Any) -> nn.Module:
    library = libraries.library("diffusers")
    torch.manual_seed(0)
    return doors.randomize(getattr(library, name)(**sizes)).eval()


def _places(frames: int, rows: int, columns: int) -> Tensor:
    ranges = (torch.arange(n) for n in (frames, rows, columns))
    return torch.cartesian_prod(*ranges)


def flux(image: tuple[int, int] = (5, 5), text: int = 7, heads: int = 3) -> Made:
    model = _model(
        "FluxTransformer2DModel",
        patch_size=1,
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        axes_dims_rope=(4, 6, 6),
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=20,
        pooled_projection_dim=12,
    )
    return model, {
        "hidden_states": random(2, image[0] * image[1], 8, seed=1),
        "encoder_hidden_states": random(2, text, 20, seed=2),
        "pooled_projections": random(2, 12, seed=3),
        "timestep": torch.tensor([0, 1]),
        "img_ids": _places(1, *image),
        "txt_ids": torch.zeros(text, 3, dtype=torch.int64),
        "return_dict": False,
    }


def wan(size: tuple[int, int, int] = (3, 10, 6), text: int = 5, heads: int = 3) -> Made:
    model = _model(
        "WanTransformer3DModel",
        num_attention_heads=heads,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        cross_attn_norm=True,
    )
    return model, {
        "hidden_states": random(2, 4, *size, seed=1),
        "encoder_hidden_states": random(2, text, 16, seed=2),
        "timestep": torch.tensor([3, 7]),
        "return_dict": False,
    }


def ltx(size: tuple[int, int, int] = (2, 3, 5), text: int = 7, padded: int = 2) -> Made:
    model = _model(
        "LTXVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=8,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=16,
    )
    frames, height, width = size
    mask = torch.ones(2, text, dtype=torch.int64)
    mask[1, text - padded :] = 0
    return model, {
        "hidden_states": random(2, frames * height * width, 4, seed=1),
        "encoder_hidden_states": random(2, text, 16, seed=2),
        "timestep": torch.tensor([[3], [7]]),
        "encoder_attention_mask": mask,
        "num_frames": frames,
        "height": height,
        "width": width,
        "return_dict": False,
    }


def qwen(image: tuple[int, int] = (5, 5), text: int = 7, padded: int = 2) -> Made:
    model = _model(
        "QwenImageTransformer2DModel",
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=20,
        axes_dims_rope=(4, 6, 6),
    )
    mask = torch.ones(2, text, dtype=torch.bool)
    mask[1, text - padded :] = False
    return model, {
        "hidden_states": random(2, image[0] * image[1], 8, seed=1),
        "encoder_hidden_states": random(2, text, 20, seed=2),
        "encoder_hidden_states_mask": mask if padded else None,
        "timestep": torch.tensor([0, 1]),
        "img_shapes": [[(1, *image)], [(1, *image)]],
        "return_dict": False,
    }


MODELS: dict[str, Callable[..., Made]] = {"Flux": flux, "Wan": wan, "LTX": ltx, "Qwen": qwen}
