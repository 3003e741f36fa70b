"""Image and video transformers of diffusers, tiny and random, spread by usp.parallelize."""

from __future__ import annotations

import logging
from typing import Any

import diffusers_models
import doors
import libraries
import pool as workers
import pytest
from pool import RemoteError
from torch import nn

import usp
from usp.integrations import diffusers as door

pytestmark = pytest.mark.library
MESHES = [(2, 1), (1, 2), (2, 2)]


def spread(model: nn.Module, mesh: Any, layout: str, again: bool) -> None:
    if again:
        door.register()
        model.set_attention_backend("usp")
        model.enable_gradient_checkpointing()
        model.train()
    usp.parallelize(model, mesh, layout=layout)


def _compared(
    mesh: tuple[int, int], layout: str, kind: str, sizes: Any, again: bool
) -> dict[str, float]:
    placed = workers.mesh(*mesh)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    model, inputs = diffusers_models.MODELS[kind](**sizes)
    with diffusers_models.fp64():
        return doors.compared(model, inputs, placed, lambda m: spread(m, placed, layout, again))


def check(
    pool: Any, mesh: tuple[int, int], layout: str, kind: str, again: bool = False, **sizes: Any
) -> None:
    libraries.library("diffusers")
    ranks = mesh[0] * mesh[1]
    for wrong in pool.run(_compared, mesh, layout, kind, sizes, again, ranks=ranks):
        assert wrong == {}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("kind", diffusers_models.MODELS)
def test_families(pool, kind, mesh) -> None:
    """Neither tokens nor heads divide."""
    check(pool, mesh, "contiguous" if mesh == (1, 2) else "zigzag", kind)


@pytest.mark.parametrize("kind", ["Flux", "Wan", "HunyuanVideo"])
def test_checkpoints_and_our_backend(pool, kind) -> None:
    check(pool, (2, 2), "striped", kind, again=True)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("SD3", {"dual": ()}),
        ("CogVideoX", {"rotary": False}),
        ("Flux", {"text": 1}),
        ("UNet", {"only_cross_attention": (True, False)}),
        ("Wan", {"each": True}),
        ("LTX", {"each": True}),
    ],
    ids=str,
)
def test_kinds_of_a_family(pool, kind, sizes) -> None:
    """No second attention, none among tokens, no rotations, no text on a rank, times of tokens."""
    check(pool, (1, 2), "zigzag", kind, **sizes)


def _refused(kind: str) -> None:
    mesh = workers.mesh(1, 2)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    if kind == "convolutions":
        made = diffusers_models.sana()
        usp.parallelize(made, mesh, "transformer_blocks")
    if kind == "first frames":
        model, given = diffusers_models.hunyuan(image_condition_type="token_replace")
    elif kind == "short text":
        model, given = diffusers_models.hunyuan(text=1, padded=0)
    elif kind == "their configuration":
        model, given = diffusers_models.flux((4, 6), 8)
        diffusers_models.enable(model, (1, 2))
    usp.parallelize(model, mesh)
    model(**given)


REFUSED = {
    "convolutions": r"transformer_blocks holds modules .* transformer_blocks\.0\.ff\.conv_depth",
    "first frames": r"transformer_blocks\.0 .* is given token_replace_emb, which would be of this",
    "short text": r"two streams of \(45, 1\) tokens are cut each by itself, .* hold .*\(1, 0\)",
    "their configuration": r"enable_parallelism\(\) has cut the tokens of a model that usp\.parall",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(pool, kind) -> None:
    libraries.library("diffusers")
    with pytest.raises(RemoteError, match=REFUSED[kind]):
        pool.run(_refused, kind, ranks=2)
