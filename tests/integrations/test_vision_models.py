"""Vision transformers of libraries, tiny and random, their tokens spread by usp.parallelize."""

from __future__ import annotations

from typing import Any

import doors
import libraries
import pool as workers
import pytest
import torch
from integration_models import random
from pool import RemoteError
from vision_models import TIMM, TINY, of_timm, of_torchvision

import usp

pytestmark = pytest.mark.library

MESHES = [(2, 1), (1, 2), (2, 2)]
# tables of rotations are made of these in fp32, whatever is asked for
LOOSE = {"rope.freqs": 1e-7}


def _compared(mesh: tuple[int, int], layout: str, kind: str, again: bool) -> dict[str, float]:
    placed = workers.mesh(*mesh)
    model = of_torchvision() if kind == "torchvision" else of_timm(kind, again)
    images = {"x": random(2, 3, 40, 40, seed=1)}
    wrong = doors.compared(
        model, images, placed, lambda m: usp.parallelize(m, placed, layout=layout)
    )
    return {name: error for name, error in wrong.items() if not error <= LOOSE.get(name, 1e-9)}


def check(pool: Any, mesh: tuple[int, int], layout: str, kind: str, again: bool = False) -> None:
    ranks = mesh[0] * mesh[1]
    for wrong in pool.run(_compared, mesh, layout, kind, again, ranks=ranks):
        assert wrong == {}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("kind", TIMM)
def test_timm(pool, kind, mesh) -> None:
    libraries.library("timm")
    check(pool, mesh, "contiguous" if mesh == (1, 2) else "zigzag", kind)


@pytest.mark.parametrize("kind", ["class token", "rotations", "relative positions"])
def test_timm_with_checkpoints(pool, kind) -> None:
    libraries.library("timm")
    check(pool, (2, 2), "zigzag", kind, True)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_torchvision(pool, mesh) -> None:
    libraries.library("torchvision")
    check(pool, mesh, "striped", "torchvision")


def _training() -> list[torch.Tensor]:
    """Dropout of tokens, of weights and of samples, on uneven shards."""
    mesh, told = workers.mesh(1, 2), []
    model = of_timm("class token", drop_path_rate=0.5, proj_drop_rate=0.3, attn_drop_rate=0.3)
    usp.parallelize(model.train(), mesh)
    torch.manual_seed(1)
    for _ in range(3):
        told.append(model(random(2, 3, 40, 40, seed=1)).detach())
    return [*told, torch.randint(2**60, ())]


def test_timm_in_training_keeps_ranks_in_step(pool) -> None:
    libraries.library("timm")
    mine, theirs = pool.run(_training, ranks=2)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert not torch.allclose(mine[0], mine[1])


def _by_hand() -> None:
    model = of_timm("class token")
    for block in model.blocks:
        block.attn.fused_attn = False
    usp.parallelize(model, workers.mesh(1, 2))
    model(random(2, 3, 40, 40, seed=1))


def test_timm_by_hand_is_refused(pool) -> None:
    libraries.library("timm")
    with pytest.raises(RemoteError, match="softmax over 13 x 13 scores is attention by hand"):
        pool.run(_by_hand, ranks=2)


def _windows() -> None:
    timm = libraries.library("timm")
    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (2, 2)}
    model = timm.create_model("swin_tiny_patch4_window7_224", **sizes, num_heads=(3, 3)).double()
    with pytest.raises(ValueError, match="the trunk of SwinTransformer is not known"):
        usp.parallelize(model, workers.mesh(1, 2))
    usp.parallelize(model, workers.mesh(1, 2), "layers.0.blocks")
    model(random(2, 3, 32, 32, seed=1))


def test_timm_with_windows_is_refused(pool) -> None:
    """Their tokens are (rows, columns), of which a rank has some rows, and windows of its own."""
    libraries.library("timm")
    with pytest.raises(RemoteError, match=r"SwinTransformerBlock.* called no attention that could"):
        pool.run(_windows, ranks=2)


def _rotated() -> None:
    timm = libraries.library("timm")
    model = doors.randomize(timm.create_model("eva02_tiny_patch14_224", **TINY)).eval()
    usp.parallelize(model, workers.mesh(1, 2), "blocks")
    model(random(2, 3, 40, 40, seed=1))


def test_timm_with_rotations_is_never_wrong(pool) -> None:
    """Its tables are of patches alone, without the class token: no entry for each token."""
    libraries.library("timm")
    with pytest.raises(RemoteError, match="size of tensor"):
        pool.run(_rotated, ranks=2)
