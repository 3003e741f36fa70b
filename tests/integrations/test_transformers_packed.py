"""Vision towers of transformers that take images of all sizes as one sequence, by cu_seqlens."""

from __future__ import annotations

import functools
from typing import Any

import doors
import libraries
import pool as workers
import pytest
import torch
from integration_models import random
from pool import RemoteError
from torch import nn
from torch.utils.checkpoint import checkpoint

import usp
from usp.integrations import transformers as door

pytestmark = pytest.mark.library
MESHES = [(2, 1), (1, 2), (2, 2)]
GRIDS = torch.tensor([[1, 6, 10], [2, 4, 4], [1, 2, 2]])  # frames, rows and columns of patches
TOKENS = 60 + 32 + 4
PATCHES = {"depth": 2, "num_heads": 3, "patch_size": 4, "spatial_merge_size": 2}
TOWERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "Qwen2-VL": (
        "qwen2_vl",
        "Qwen2VLVisionConfig",
        "Qwen2VisionTransformerPretrainedModel",
        {"embed_dim": 24, "hidden_size": 20, "mlp_ratio": 2},
    ),
    "Qwen2.5-VL": (  # a layer that looks at windows, and one that looks at images
        "qwen2_5_vl",
        "Qwen2_5_VLVisionConfig",
        "Qwen2_5_VisionTransformerPretrainedModel",
        {"hidden_size": 24, "intermediate_size": 32, "out_hidden_size": 20}
        | {"window_size": 16, "fullatt_block_indexes": [1]},
    ),
    "Qwen3-VL": (  # merges what comes out of the first layer, and of the last
        "qwen3_vl",
        "Qwen3VLVisionConfig",
        "Qwen3VLVisionModel",
        {"hidden_size": 24, "intermediate_size": 32, "out_hidden_size": 20}
        | {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1]},
    ),
}
EXPERTS = ("qwen3_vl_moe", "Qwen3VLMoeVisionConfig", "Qwen3VLMoeVisionModel")
TOWERS["Qwen3-VL-MoE"] = (*EXPERTS, TOWERS["Qwen3-VL"][3])


class Tower(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.tower(pixels, grid_thw=GRIDS)
        return out.last_hidden_state, out.pooler_output, *getattr(out, "deepstack_features", ())


def tower(kind: str, implementation: str = "usp") -> nn.Module:
    folder, config, name, options = TOWERS[kind]
    configs = libraries.library(f"transformers.models.{folder}.configuration_{folder}")
    models = libraries.library(f"transformers.models.{folder}.modeling_{folder}")
    door.register()
    config = getattr(configs, config)(**PATCHES, **options)
    model = getattr(models, name)._from_config(config, attn_implementation=implementation)
    return Tower(doors.randomize(model)).eval()


def pixels() -> dict[str, torch.Tensor]:
    return {"pixels": random(TOKENS, 3 * 2 * 4 * 4, seed=1)}


def _compared(
    degrees: tuple[int, int], layout: str, kind: str, implementation: str, again: bool
) -> dict[str, float]:
    mesh, model = workers.mesh(*degrees), tower(kind, implementation).train(again)

    def spread(wrapped: nn.Module) -> None:
        usp.parallelize(wrapped, mesh, layout=layout)
        if again:
            wrapped.tower.gradient_checkpointing_enable({"use_reentrant": False})

    return doors.compared(model, pixels(), mesh, spread)


@pytest.mark.parametrize("degrees", MESHES, ids=str)
@pytest.mark.parametrize("kind", TOWERS)
def test_images_stay_apart_over_ranks(pool, kind, degrees) -> None:
    libraries.library("transformers")
    layout = {(2, 1): "contiguous", (1, 2): "zigzag", (2, 2): "striped"}[degrees]
    args = degrees, layout, kind, "usp", False
    for wrong in pool.run(_compared, *args, ranks=degrees[0] * degrees[1]):
        assert wrong == {}


@pytest.mark.parametrize(("implementation", "again"), [("sdpa", False), ("usp", True)])
def test_by_other_means_and_computed_again(pool, implementation, again) -> None:
    libraries.library("transformers")
    args = (1, 2), "zigzag", "Qwen2.5-VL", implementation, again
    for wrong in pool.run(_compared, *args, ranks=2):
        assert wrong == {}


@pytest.mark.parametrize("kind", TOWERS)
def test_on_one_device_it_is_what_transformers_computes(kind) -> None:
    wanted, found = (doors.results(tower(kind, how), pixels()) for how in ("eager", "usp"))
    assert doors.errors(wanted, found, 1e-5) == {}  # part of it in fp32


class Whole(nn.Module):
    """Images among a text, whose tokens have three positions each; of Qwen3-VL the tower alone is
    spread."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(1, 50, (1, 40), generator=torch.Generator().manual_seed(1))
        ids[:, 5 : 5 + TOKENS // 4] = 55  # a row of the tower's for each, the images one by one
        given = {"image_grid_thw": GRIDS, "use_cache": False}
        places = torch.arange(40)
        given["position_ids"] = torch.stack((places, places // 5, places % 7))[:, None]
        out = self.model(input_ids=ids, pixel_values=pixels, labels=ids, **given)
        return out.loss, out.logits


TEXT = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 61}
TEXT |= {"intermediate_size": 32, "num_key_value_heads": 1, "pad_token_id": 0, "head_dim": 10}
TEXT["rope_parameters"] = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "mrope_section": [1, 2, 2],
}


class Text(nn.Module):
    """Of images and texts that are embedded already, each token with three positions; packed, where
    a fourth says where it stands in its document. With a mesh its tokens are cut before it."""

    def __init__(self, model: nn.Module, packed: bool) -> None:
        super().__init__()
        self.model, self.packed, self.mesh = model, packed, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(27)
        grid = (places % 11, places // 5, places % 7, places % 3)[not self.packed :]
        positions = torch.stack(grid)[:, None].expand(-1, 2, -1)
        given = {"inputs_embeds": x, "position_ids": positions}
        if self.mesh is None:
            return self.model(**given, use_cache=False).last_hidden_state
        cut = usp.cut_batch(given, self.mesh, "zigzag")
        out = cut["spread"].unshard(self.model(**cut, use_cache=False).last_hidden_state)
        return out.detach() + (out - out.detach()) / self.mesh.size  # every rank has the whole


def _compared_text(packed: bool, outputs: str) -> dict[str, float]:
    library = libraries.library("transformers.models.qwen2_5_vl")
    door.register()
    config = library.configuration_qwen2_5_vl.Qwen2_5_VLTextConfig(**TEXT)
    kind = library.modeling_qwen2_5_vl.Qwen2_5_VLTextModel
    model = kind._from_config(config, attn_implementation="usp")
    model, mesh = Text(doors.randomize(model), packed).eval(), workers.mesh(2, 2)

    def spread(text: Text) -> None:
        if outputs == "local":
            usp.parallelize(text.model, mesh, outputs="local")
            text.mesh = mesh
        else:
            usp.parallelize(text, mesh, layout="zigzag")

    return doors.compared(model, {"x": random(2, 27, 20, seed=1)}, mesh, spread)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("outputs", ["joined", "local"])
def test_a_text_by_itself_has_three_positions_a_token(pool, packed, outputs) -> None:
    libraries.library("transformers")
    for wrong in pool.run(_compared_text, packed, outputs, ranks=4):
        assert wrong == {}


def _compared_whole(degrees: tuple[int, int], kind: str) -> dict[str, float]:
    library = libraries.library("transformers")
    door.register()
    vision = PATCHES | TOWERS[kind][3]
    tokens = {"image_token_id": 55, "video_token_id": 56, "vision_start_token_id": 57}
    if kind == "Qwen2-VL":
        vision["hidden_size"] = 20  # its tower ends in what it calls so
    prefix = {"Qwen2-VL": "Qwen2VL", "Qwen2.5-VL": "Qwen2_5_VL", "Qwen3-VL": "Qwen3VL"}[kind]
    config = getattr(library, f"{prefix}Config")(text_config=TEXT, vision_config=vision, **tokens)
    name = getattr(library, f"{prefix}ForConditionalGeneration")
    model = Whole(doors.randomize(name._from_config(config, attn_implementation="usp"))).eval()
    mesh = workers.mesh(*degrees)
    found = doors.compared(model, pixels(), mesh, lambda m: usp.parallelize(m, mesh))
    spread = usp.parallelize(model, mesh).model.model.language_model.layers[0].__dict__
    assert ("forward" in spread) is (kind != "Qwen3-VL")
    return found


@pytest.mark.parametrize("degrees", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"])
def test_the_whole_model_has_its_loss_and_every_gradient(pool, kind, degrees) -> None:
    libraries.library("transformers")
    ranks = degrees[0] * degrees[1]
    for wrong in pool.run(_compared_whole, degrees, kind, ranks=ranks):
        assert wrong == {}


def test_what_merges_inner_layers_is_refused_where_no_rank_has_the_whole() -> None:
    with pytest.raises(NotImplementedError, match=r"'\*deepstack_merger_list\.\*'.* no rank has"):
        usp.parallelize(tower("Qwen3-VL"), None, outputs="local")


def _part_again(how: str) -> dict[str, float]:
    """A checkpoint of attention alone, which is told its documents, or of what it calls."""
    model, mesh = tower("Qwen2.5-VL"), workers.mesh(1, 2)

    def spread(wrapped: nn.Module) -> None:
        attention = wrapped.tower.blocks[0].attn
        usp.parallelize(wrapped, mesh)
        inner = attention.forward
        attention.forward = functools.partial(_again, inner, how == "moved")

    return doors.compared(model, pixels(), mesh, spread)


def _again(inner: Any, is_moved: bool, x: torch.Tensor, **given: Any) -> torch.Tensor:
    if is_moved:
        given["cu_seqlens"] = given["cu_seqlens"].clone()
    return checkpoint(inner, x, **given, use_reentrant=False)


def test_attention_alone_is_computed_again(pool) -> None:
    libraries.library("transformers")
    for wrong in pool.run(_part_again, "in place", ranks=2):
        assert wrong == {}


def test_documents_that_were_left_behind_are_refused(pool) -> None:
    libraries.library("transformers")
    with pytest.raises(RemoteError, match=r"boundaries of \(2,\) were moved before the backward"):
        pool.run(_part_again, "moved", ranks=2)


def _of_others() -> None:
    model = tower("Qwen2-VL")
    usp.parallelize(model, workers.mesh(1, 2))
    block = model.tower.blocks[0]
    inner = block.forward
    block.forward = lambda *x, **y: inner(*x, **y | {"cu_seqlens": torch.tensor([0, 5, 90])})
    model(**pixels())


def test_documents_that_end_elsewhere_are_refused(pool) -> None:
    libraries.library("transformers")
    with pytest.raises(RemoteError, match=r"documents end at \(90,\), where 96 tokens are spread"):
        pool.run(_of_others, ranks=2)
