"""Models of science's libraries, tiny and random, their tokens spread by usp.parallelize."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import doors
import example_programs as examples
import libraries
import pool as workers
import pytest
import torch
from integration_models import random
from pool import RemoteError
from torch import nn

import usp

pytestmark = pytest.mark.library

MESHES = [(2, 1), (1, 2), (2, 2)]


def monai_vit(**more: Any) -> nn.Module:
    """Of a volume: 27 patches; with hidden states of all layers."""
    nets = libraries.library("monai.networks.nets")
    sizes = {"hidden_size": 24, "mlp_dim": 32, "num_layers": 3, "num_heads": 3}
    return nets.ViT(1, (12, 12, 12), (4, 4, 4), **sizes | {"qkv_bias": True} | more)


def monai_classifier() -> nn.Module:
    """With a class token."""
    return monai_vit(classification=True, num_classes=3)


def monai_unetr() -> nn.Module:
    """Reads the hidden states of three of its twelve layers, 8 tokens."""
    nets = libraries.library("monai.networks.nets")
    sizes = {"feature_size": 2, "hidden_size": 12, "mlp_dim": 16, "num_heads": 3}
    return nets.UNETR(1, 2, (32, 32, 32), **sizes, norm_name="instance")


def prithvi(**more: Any) -> nn.Module:
    """33 tokens of two images of a place, and a class token; as terratorch uses it, a backbone."""
    module = libraries.library("terratorch.models.backbones.prithvi_mae")
    sizes = {"embed_dim": 48, "depth": 3, "num_heads": 3, "in_chans": 3, "num_frames": 2}
    model = module.PrithviViT(img_size=32, patch_size=(1, 8, 8), **sizes | more)
    model.forward = model.forward_features  # a list of what every layer returns
    return model


def dit() -> nn.Module:
    """30 patches and a condition."""
    module = libraries.library("physicsnemo.models.dit")
    sizes = {"hidden_size": 24, "depth": 2, "num_heads": 3, "condition_dim": 5}
    return Conditioned(module.DiT((20, 24), 3, (4, 4), **sizes))


class Conditioned(nn.Module):
    def __init__(self, dit: nn.Module) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dit(x, torch.tensor([0.3, 0.8]).to(x), random(2, 5, seed=2))


def processor(**more: Any) -> nn.Module:
    """Of a grid of 27 points; a batch of one."""
    module = libraries.library("anemoi.models.layers.processor")
    kernels = libraries.library("anemoi.utils.config").DotDict()
    sizes = {"num_layers": 2, "num_channels": 24, "num_heads": 3, "mlp_hidden_ratio": 2}
    sizes |= {"num_chunks": 1, "layer_kernels": kernels}
    sizes |= {"attention_implementation": "scaled_dot_product_attention"}
    return Grid(module.TransformerProcessor(**sizes | more))


class Grid(nn.Module):
    def __init__(self, processor: nn.Module, batch: int = 1) -> None:
        super().__init__()
        self.processor, self.batch = processor, batch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shapes = libraries.library("anemoi.models.distributed.shapes")
        return self.processor(x, self.batch, shapes.GraphShardInfo())


def volume(side: int) -> dict[str, Any]:
    return {"x": random(2, 1, side, side, side, seed=1)}


Made = tuple[str, Callable[[], nn.Module], dict[str, Any]]
MODELS: dict[str, Made] = {
    "MONAI's ViT": ("monai", monai_vit, volume(12)),
    "MONAI's ViT with a class token": ("monai", monai_classifier, volume(12)),
    "MONAI's UNETR": ("monai", monai_unetr, volume(32)),
    "Prithvi": (
        "terratorch.models.backbones.prithvi_mae",
        prithvi,
        {"x": random(2, 3, 2, 32, 32, seed=1)},
    ),
    "PhysicsNeMo's DiT": ("physicsnemo.models.dit", dit, {"x": random(2, 3, 20, 24, seed=1)}),
    "anemoi's processor": (
        "anemoi.models.layers.processor",
        processor,
        {"x": random(27, 24, seed=1)},
    ),
    "anemoi's windows": (
        "anemoi.models.layers.processor",
        functools.partial(processor, window_size=3),
        {"x": random(27, 24, seed=1)},
    ),
}
# positions and times that these libraries make in fp32, whatever is asked for
LOOSE = {"PhysicsNeMo's DiT": 1e-6}


class Volumes(nn.Module):
    """All libraries call the volume something else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x)


def _compared(mesh: tuple[int, int], layout: str, kind: str) -> dict[str, float]:
    placed, (_, make, inputs) = workers.mesh(*mesh), MODELS[kind]
    model = doors.randomize(Volumes(make())).eval()
    wrong = doors.compared(
        model, inputs, placed, lambda m: usp.parallelize(m, placed, layout=layout)
    )
    return {name: error for name, error in wrong.items() if not error <= LOOSE.get(kind, 1e-9)}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_a_spread_model_is_the_whole_one(pool, kind, mesh) -> None:
    libraries.library(MODELS[kind][0])
    layout = {(2, 1): "contiguous", (1, 2): "zigzag", (2, 2): "striped"}[mesh]
    for wrong in pool.run(_compared, mesh, layout, kind, ranks=mesh[0] * mesh[1]):
        assert wrong == {}


# Fields of the atmosphere ------------------------------------------------------------------------


def _of_a_night(mesh: tuple[int, int], kind: str) -> dict[str, float]:
    """Two times of what train_climate.py forecasts: 10 levels x 80 x 80 points, two quantities."""
    placed, fields = workers.mesh(*mesh), examples.module("train_climate").fields()
    air = fields[:2, :, :80, :80].double()
    air = (air - air.mean((0, 2, 3), keepdim=True)) / air.std((0, 1, 2, 3))
    if kind == "MONAI":  # 125 patches
        sizes = {"hidden_size": 24, "mlp_dim": 32, "num_layers": 2, "num_heads": 3}
        nets = libraries.library("monai.networks.nets")
        model, x = nets.ViT(2, (10, 80, 80), (2, 16, 16), **sizes), air.movedim(-1, 1)
    else:  # 27 x 27 points, of all levels and quantities at one time
        model = processor(num_channels=20, num_heads=2, window_size=40)
        x = air[0, :, ::3, ::3].movedim(0, -2).reshape(27 * 27, 20)
    model = doors.randomize(Volumes(model)).eval()
    return doors.compared(model, {"x": x}, placed, lambda m: usp.parallelize(m, placed))


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("kind", ["MONAI", "anemoi"])
def test_fields_of_the_atmosphere(pool, kind, mesh) -> None:
    libraries.library("iris_sample_data")
    libraries.library({"MONAI": "monai", "anemoi": MODELS["anemoi's processor"][0]}[kind])
    for wrong in pool.run(_of_a_night, mesh, kind, ranks=mesh[0] * mesh[1]):
        assert wrong == {}


# anemoi -----------------------------------------------------------------------------------------


def flash_attn_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any
) -> torch.Tensor:
    """What flash-attn computes, which needs a GPU: (batch, points, heads, head dim)."""
    assert not given["causal"] and given["dropout_p"] == 0
    (near, _), softcap = given["window_size"], given["softcap"]
    away = (torch.arange(len(q[0]))[:, None] - torch.arange(len(q[0]))).abs()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores - given["alibi_slopes"].to(q)[:, :, None, None] * away
    scores = scores.masked_fill(away > near, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def _by_flash() -> dict[str, float]:
    flash = types.ModuleType("flash_attn")
    flash.flash_attn_func, flash.__version__ = flash_attn_func, "2.8.3"
    mesh = workers.mesh(2, 2)
    with mock.patch.dict(sys.modules, flash_attn=flash):
        options = {"window_size": 4, "softcap": 1.5, "use_alibi_slopes": True}
        model = processor(attention_implementation="flash_attention", **options)
    model = doors.randomize(model).eval()
    x = {"x": random(27, 24, seed=1)}
    return doors.compared(model, x, mesh, lambda m: usp.parallelize(m, mesh, layout="zigzag"))


def test_anemoi_by_flash_attn(pool) -> None:
    """Windows, softcap and ALiBi of what it computes on one GPU."""
    libraries.library(MODELS["anemoi's processor"][0])
    for wrong in pool.run(_by_flash, ranks=4):
        assert wrong == {}


class Banded(nn.Module):
    """anemoi's own mask of 40,320 x 40,320 points would be made of 13 GB of integers."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **given: Any):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        window = given["window_size"], given["window_size"]
        return usp.long_context_attention(q, k, v, window_size=window).transpose(1, 2)


def _of_a_globe() -> dict[str, float]:
    mesh = workers.mesh(1, 3)
    model = doors.randomize(processor(num_layers=1, num_channels=12, window_size=512)).eval()
    x = {"x": random(40320, 12, seed=1)}
    attention = model.processor.proc[0].attention
    theirs, attention.attention = attention.attention, Banded()

    def spread(ours: nn.Module) -> None:
        ours.processor.proc[0].attention.attention = theirs
        usp.parallelize(ours, mesh)

    return doors.compared(model, x, mesh, spread)


def test_windows_of_forty_thousand_points(pool) -> None:
    """The octahedral grid of ECMWF at one degree (O96)."""
    libraries.library(MODELS["anemoi's processor"][0])
    for wrong in pool.run(_of_a_globe, ranks=3):
        assert wrong == {}


# MONAI ------------------------------------------------------------------------------------------


def _dropout() -> list[torch.Tensor]:
    """In evaluation nothing is dropped; in training what is dropped goes by positions."""
    model, mesh = doors.randomize(monai_vit(dropout_rate=0.5)).eval(), workers.mesh(1, 2)
    x = volume(12)["x"]
    whole = model(x)[0].detach()
    usp.parallelize(model, mesh)
    twice = [model(x)[0].detach() for _ in range(2)]
    assert all(block.attn.dropout_rate == 0.5 for block in model.blocks)
    assert not any(block.attn.use_flash_attention for block in model.blocks)
    model.train()
    return [whole, *twice, model(x)[0].detach()]


def test_monai_drops_in_training_alone(pool) -> None:
    libraries.library("monai")
    found = pool.run(_dropout, ranks=2)
    for whole, once, again, trained in found:
        assert torch.equal(once, again) and not torch.allclose(once, trained)
        torch.testing.assert_close(once, whole, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(trained, found[0][-1])


def _by_hand() -> None:
    usp.parallelize(monai_vit(save_attn=True), workers.mesh(1, 2))


def test_monai_that_keeps_its_weights_is_refused(pool) -> None:
    libraries.library("monai")
    with pytest.raises(RemoteError, match="SABlock has save_attn, with which it computes"):
        pool.run(_by_hand, ranks=2)


def _swin() -> None:
    nets = libraries.library("monai.networks.nets")
    usp.parallelize(nets.SwinUNETR(1, 2, feature_size=12), workers.mesh(1, 2))


def test_windows_of_monai_are_not_known(pool) -> None:
    """Their tokens are cut into windows and merged on the way: no trunk."""
    libraries.library("monai")
    with pytest.raises(RemoteError, match="the trunk of SwinUNETR is not known"):
        pool.run(_swin, ranks=2)


def _compiled_states() -> dict[str, float]:
    placed = workers.mesh(1, 2)
    model = doors.randomize(Volumes(monai_vit())).eval()

    def compiled(wrapped: nn.Module) -> nn.Module:
        wrapped.model.forward = torch.compile(wrapped.model.forward, backend="aot_eager")
        return wrapped

    return doors.compared(model, volume(12), placed, lambda m: usp.parallelize(m, placed), compiled)


def test_hidden_states_of_a_compiled_model_are_whole(pool) -> None:
    libraries.library("monai")
    for wrong in pool.run(_compiled_states, ranks=2):
        assert wrong == {}


# Others -----------------------------------------------------------------------------------------


def _refused(case: str) -> None:
    mesh = workers.mesh(1, 2)
    if case == "prompts":
        usp.parallelize(prithvi(vpt=True, vpt_n_tokens=2), mesh)
    elif case in ("windows", "rotations"):
        model = processor(window_size=3)
        attention = model.processor.proc[0].attention
        attention.attention_implementation = "triton_attention"  # of versions to come
        if case == "rotations":
            attention.attention_implementation = "flash_attention"
            attention.attention.use_rotary_embeddings = True
        usp.parallelize(model, mesh)
    elif case == "batch":
        model = processor().double()
        model.batch = 2
        usp.parallelize(model, mesh)(random(56, 24, seed=1))
    else:
        small = {"embed_dim": 24, "encoder_depths": (2, 2), "encoder_num_heads": (2, 4)}
        small |= {"decoder_depths": (2, 2), "decoder_num_heads": (4, 2), "num_heads": 2}
        usp.parallelize(libraries.library("aurora").Aurora(**small), mesh)


@pytest.mark.parametrize(
    ("library", "case", "message"),
    [
        (MODELS["Prithvi"][0], "prompts", "puts 2 prompts behind the first token"),
        (
            MODELS["anemoi's processor"][0],
            "windows",
            "has window_size=3 by 'triton_attention', among this rank's own tokens",
        ),
        (MODELS["anemoi's processor"][0], "rotations", "use_rotary_embeddings, which count from 0"),
        (
            MODELS["anemoi's processor"][0],
            "batch",
            "has 14 queries and 14 keys where",
        ),
        ("aurora", "aurora", "the trunk of Aurora is not known"),
    ],
)
def test_what_would_be_wrong_is_refused(pool, library, case, message) -> None:
    libraries.library(library)
    with pytest.raises(RemoteError, match=message):
        pool.run(_refused, case, ranks=2)
