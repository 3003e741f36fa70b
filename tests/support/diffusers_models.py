"""Transformers of diffusers, tiny and random, in fp64, and what they are given."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import doors
import libraries
import torch
from integration_models import random
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from usp.integrations import diffusers as door

Made = tuple[nn.Module, dict[str, Any]]


@contextmanager
def fp64() -> Iterator[None]:
    """What these models compute in fp32, whatever their dtype, is in fp64."""
    with mock.patch.object(Tensor, "float", Tensor.double):
        yield


def enable(model: nn.Module, mesh: tuple[int, int], **options: Any) -> None:
    """Their own configuration, whose mesh is of CPUs."""
    library = libraries.library("diffusers")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    door.register()
    names = ("ring", "ulysses", "fsdp")
    axes = init_device_mesh("cpu", (*mesh[::-1], 1), mesh_dim_names=names)
    degrees = {"ulysses_degree": mesh[0], "ring_degree": mesh[1]}
    config = library.ContextParallelConfig(**degrees, mesh=axes, **options)
    model.set_attention_backend("usp")
    with mock.patch("torch.accelerator.device_count", lambda: 1):  # it divides by these
        model.enable_parallelism(config=config)


def _model(name: str, **sizes: Any) -> nn.Module:
    library = libraries.library("diffusers")
    torch.manual_seed(0)
    return doors.randomize(getattr(library, name)(**sizes)).eval()


def _places(frames: int, rows: int, columns: int) -> Tensor:
    ranges = (torch.arange(n) for n in (frames, rows, columns))
    return torch.cartesian_prod(*ranges)


def _steps(each: int = 0) -> Tensor:
    """Of two samples, or of each of their tokens."""
    return torch.arange(2 * each).view(2, each) % 11 if each else torch.tensor([3, 7])


def flux(image: tuple[int, int] = (5, 5), text: int = 7) -> Made:
    model = _model(
        "FluxTransformer2DModel",
        patch_size=1,
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        axes_dims_rope=(4, 6, 6),
        attention_head_dim=16,
        num_attention_heads=3,
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


def wan(size: tuple[int, int, int] = (3, 10, 6), text: int = 5, each: bool = False) -> Made:
    model = _model(
        "WanTransformer3DModel",
        num_attention_heads=3,
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
        "timestep": _steps(size[0] * (size[1] // 2) * (size[2] // 2)) if each else _steps(),
        "return_dict": False,
    }


def ltx(
    size: tuple[int, int, int] = (2, 3, 5), text: int = 7, padded: int = 2, each: bool = False
) -> Made:
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
        "timestep": _steps(frames * height * width) if each else _steps()[:, None],
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


def dit() -> Made:
    model = _model(
        "DiTTransformer2DModel",
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=10,
        patch_size=2,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    )
    return model, {
        "hidden_states": random(2, 4, 10, 10, seed=1),
        "timestep": _steps(),
        "class_labels": torch.tensor([1, 4]),
        "return_dict": False,
    }


def unet(**more: Any) -> Made:
    """Of 60 tokens in the outer blocks and 15 in the middle one."""
    sizes: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "block_out_channels": (12, 24)}
    sizes["down_block_types"] = ("CrossAttnDownBlock2D", "DownBlock2D")
    sizes["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D")
    sizes |= {"layers_per_block": 1, "cross_attention_dim": 20, "attention_head_dim": 3}
    model = _model("UNet2DConditionModel", **sizes, norm_num_groups=3, **more)
    return model, {
        "sample": random(2, 4, 10, 6, seed=1),
        "timestep": _steps(),
        "encoder_hidden_states": random(2, 7, 20, seed=2),
        "return_dict": False,
    }


def pixart(text: int = 7, padded: int = 2) -> Made:
    model = _model(
        "PixArtTransformer2DModel",
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=10,
        patch_size=2,
        norm_num_groups=4,
        cross_attention_dim=24,
        caption_channels=16,
        use_additional_conditions=False,
    )
    mask = torch.ones(2, text, dtype=torch.int64)
    mask[1, text - padded :] = 0
    return model, {
        "hidden_states": random(2, 4, 10, 10, seed=1),
        "encoder_hidden_states": random(2, text, 16, seed=2),
        "encoder_attention_mask": mask,
        "timestep": _steps(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def flux2(image: tuple[int, int] = (5, 5), text: int = 7) -> Made:
    model = _model(
        "Flux2Transformer2DModel",
        patch_size=1,
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        axes_dims_rope=(4, 4, 4, 4),
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=20,
        timestep_guidance_channels=16,
    )
    places = torch.nn.functional.pad(_places(1, *image), (0, 1))
    return model, {
        "hidden_states": random(2, image[0] * image[1], 8, seed=1),
        "encoder_hidden_states": random(2, text, 20, seed=2),
        "timestep": torch.tensor([0, 1]),
        "guidance": torch.tensor([2, 3]),
        "img_ids": places,
        "txt_ids": torch.nn.functional.pad(torch.arange(text)[:, None], (3, 0)),
        "return_dict": False,
    }


def sd3(text: int = 7, dual: tuple[int, ...] = (0, 1)) -> Made:
    model = _model(
        "SD3Transformer2DModel",
        sample_size=10,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=20,
        caption_projection_dim=24,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=dual,
        qk_norm="rms_norm",
    )
    return model, {
        "hidden_states": random(2, 4, 10, 10, seed=1),
        "encoder_hidden_states": random(2, text, 20, seed=2),
        "pooled_projections": random(2, 12, seed=3),
        "timestep": _steps(),
        "return_dict": False,
    }


def cogvideox(text: int = 7, rotary: bool = True) -> Made:
    model = _model(
        "CogVideoXTransformer3DModel",
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=10,
        sample_height=6,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=2,
        max_text_seq_length=text,
        use_rotary_positional_embeddings=rotary,
    )
    video = random(2, 3, 4, 6, 10, seed=1)
    given = {
        "hidden_states": video,
        "encoder_hidden_states": random(2, text, 16, seed=2),
        "timestep": _steps(),
        "return_dict": False,
    }
    if rotary:
        given["image_rotary_emb"] = (random(45, 16, seed=4), random(45, 16, seed=5))
    return model, given


def hunyuan(text: int = 7, padded: int = 2, **more: Any) -> Made:
    model = _model(
        "HunyuanVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        **more,
    )
    mask = torch.ones(2, text, dtype=torch.int64)
    mask[1, text - padded :] = 0
    return model, {
        "hidden_states": random(2, 4, 3, 6, 10, seed=1),
        "encoder_hidden_states": random(2, text, 16, seed=2),
        "encoder_attention_mask": mask,
        "pooled_projections": random(2, 8, seed=3),
        "timestep": _steps(),
        "guidance": torch.tensor([2, 3]),
        "return_dict": False,
    }


def stable_audio(length: int = 24, text: int = 7, padded: int = 2) -> Made:
    model = _model(
        "StableAudioDiTModel",
        sample_size=length,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=12,
        cross_attention_input_dim=16,
    )
    mask = torch.ones(2, text, dtype=torch.bool)
    mask[1, text - padded :] = False
    return model, {
        "hidden_states": random(2, 4, length, seed=1),
        "encoder_hidden_states": random(2, text, 16, seed=2),
        "global_hidden_states": random(2, 1, 12, seed=3),
        "encoder_attention_mask": mask,
        "rotary_embedding": (random(length + 1, 4, seed=4), random(length + 1, 4, seed=5)),
        "timestep": _steps(),
        "return_dict": False,
    }


def sana() -> nn.Module:
    return _model(
        "SanaTransformer2DModel",
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    )


MODELS: dict[str, Callable[..., Made]] = {
    "DiT": dit,
    "UNet": unet,
    "PixArt": pixart,
    "Stable Audio": stable_audio,
    "Wan": wan,
    "LTX": ltx,
    "Flux": flux,
    "Flux 2": flux2,
    "SD3": sd3,
    "CogVideoX": cogvideox,
    "HunyuanVideo": hunyuan,
    "Qwen": qwen,
}
