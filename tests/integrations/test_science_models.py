"""Models of science's libraries, tiny and random, their tokens spread by usp.parallelize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import doors
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
    return Grid(
        module.TransformerProcessor(
            attention_implementation="scaled_dot_product_attention", **sizes | more
        )
    )


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
    for wrong in pool.run(_compared, mesh, layout, kind, ranks=mesh[0] * mesh[1], timeout=250):
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
    found = pool.run(_dropout, ranks=2, timeout=200)
    for whole, once, again, trained in found:
        assert torch.equal(once, again) and not torch.allclose(once, trained)
        torch.testing.assert_close(once, whole, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(trained, found[0][-1])


def _by_hand() -> None:
    usp.parallelize(monai_vit(save_attn=True), workers.mesh(1, 2))


def test_monai_that_keeps_its_weights_is_refused(pool) -> None:
    libraries.library("monai")
    with pytest.raises(RemoteError, match="SABlock has save_attn, with which it computes"):
        pool.run(_by_hand, ranks=2, timeout=200)


def _swin() -> None:
    nets = libraries.library("monai.networks.nets")
    usp.parallelize(nets.SwinUNETR(1, 2, feature_size=12), workers.mesh(1, 2))


def test_windows_of_monai_are_not_known(pool) -> None:
    """Their tokens are cut into windows and merged on the way: no trunk."""
    libraries.library("monai")
    with pytest.raises(RemoteError, match="the trunk of SwinUNETR is not known"):
        pool.run(_swin, ranks=2, timeout=200)


def _compiled_states() -> dict[str, float]:
    placed = workers.mesh(1, 2)
    model = doors.randomize(Volumes(monai_vit())).eval()

    def compiled(wrapped: nn.Module) -> nn.Module:
        wrapped.model.forward = torch.compile(wrapped.model.forward, backend="aot_eager")
        return wrapped

    return doors.compared(model, volume(12), placed, lambda m: usp.parallelize(m, placed), compiled)


def test_hidden_states_of_a_compiled_model_are_whole(pool) -> None:
    libraries.library("monai")
    for wrong in pool.run(_compiled_states, ranks=2, timeout=250):
        assert wrong == {}


# Others -----------------------------------------------------------------------------------------


def _refused(case: str) -> None:
    mesh = workers.mesh(1, 2)
    if case == "prompts":
        usp.parallelize(prithvi(vpt=True, vpt_n_tokens=2), mesh)
    elif case == "windows":
        usp.parallelize(processor(window_size=3), mesh)
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
        (MODELS["anemoi's processor"][0], "windows", "has window_size=3, whose mask it makes"),
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
        pool.run(_refused, case, ranks=2, timeout=200)
