"""MLPs of models that exist, in tiles: on one device, and of each rank's tokens."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import diffusers_models
import doors
import libraries
import pool as workers
import pytest
import torch
import torch.nn.functional as F
from integration_models import random
from torch import Tensor, nn
from transformers_models import inputs_of, model_of
from vision_models import TIMM, of_timm, of_torchvision

import usp

WIDTH, TOKENS = 12, 13


class Activation(nn.Module):
    """As libraries have their own, which are no modules of torch."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class Block(nn.Module):
    def __init__(self, drop: float) -> None:
        super().__init__()
        self.qkv, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), nn.Sequential()
        self.mlp.append(nn.Linear(WIDTH, 16)).append(Activation())
        self.mlp.append(nn.Dropout(drop)).append(nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block(drop) for _ in range(2))
        self.blocks[1].mlp = self.blocks[0].mlp  # a module at two places is one
        doors.randomize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


TRUNK = usp.Boundary("blocks", mlp="*.mlp")
INPUTS = {"x": random(2, TOKENS, 5, seed=1)}


def heights(model: nn.Module) -> list[int]:
    """Tokens that the activation of a model sees in a forward, call by call."""
    seen: list[int] = []
    hook = model.blocks[0].mlp[1].register_forward_hook(lambda _, x, y: seen.append(y.shape[-2]))
    model(**INPUTS)
    hook.remove()
    return seen


def test_in_place_and_undone() -> None:
    whole, model = Model(), Model()
    assert usp.replace_mlp(model, 3, only="*.mlp") is model
    assert heights(model) == 2 * [5, 4, 4] and heights(whole) == 2 * [13]
    with pytest.raises(ValueError, match=r"blocks.0.mlp compute in tiles already"):
        usp.replace_mlp(model, 2, only=nn.Sequential)
    wanted = doors.results(whole, INPUTS)
    usp.parallelize(model, None, TRUNK)  # before, after
    usp.parallelize(other := Model(), None, "blocks")
    usp.replace_mlp(other, 5, only=lambda name, module: name.endswith("mlp"))
    usp.parallelize(third := Model(), None, TRUNK, tiles=4)
    assert heights(third) == 2 * [4, 3, 3, 3]
    for ours in (model, other, third, copy.deepcopy(third), pickle.loads(pickle.dumps(third))):
        assert doors.errors(wanted, doors.results(ours, INPUTS)) == {}
        usp.restore(ours)
        assert heights(ours) == 2 * [13]
        assert not any("forward" in vars(module) for module in ours.modules())


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r'Model is not known: .* only="\*.mlp"'):
        usp.replace_mlp(Model(), 2)
    with pytest.raises(ValueError, match="'ffn' means no module of Model"):
        usp.replace_mlp(Model(), 2, only=["*.mlp", "ffn"])
    with pytest.raises(ValueError, match="no module of blocks is known to be an MLP"):
        usp.parallelize(Model(), None, "blocks", tiles=2)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 16, batch_first=True)
    with pytest.raises(ValueError, match="no module of layers is known to be an MLP"):
        usp.replace_mlp(nn.TransformerEncoder(layer, 2), 2)
    model = Model()
    with pytest.raises(NotImplementedError, match=r"self_attn \(MultiheadAttention\): it is"):
        usp.replace_mlp(layer, 2, only=nn.TransformerEncoderLayer)
    with pytest.raises(ValueError, match="tiles must be 1 or more, got 0"):
        usp.replace_mlp(model, 0, only="*.mlp")
    assert not any("forward" in vars(m) for m in (*model.modules(), *layer.modules()))


def _spread(mesh: tuple[int, int]) -> dict[str, float]:
    placed = workers.mesh(*mesh)
    trunk = usp.Boundary("blocks", mlp="*.mlp")
    return doors.compared(
        Model(), INPUTS, placed, lambda m: usp.parallelize(m, placed, trunk, tiles=3)
    )


def _with_dropout() -> list[float]:
    """The derivative along a direction, and that of the gradients, of all ranks together.

    Two lengths come before their backward, where a tile cannot tell which it is of.
    """
    mesh, model = workers.mesh(1, 2), Model(0.4)
    usp.parallelize(model, mesh, TRUNK, tiles=3)
    directions = [random(*p.shape, seed=n) for n, p in enumerate(model.parameters())]

    def loss() -> Tensor:
        torch.manual_seed(3)
        outs = [model(random(2, tokens, 5, seed=1)) for tokens in (TOKENS, 8)]
        assert torch.rand(()) == after[0] if after else after.append(torch.rand(())) is None
        return sum((n + 1) * out.square().mean() for n, out in enumerate(outs))

    after: list[Tensor] = []
    loss().backward()
    usp.all_reduce_gradients(model, mesh)
    told = sum((p.grad * d).sum() for p, d in zip(model.parameters(), directions, strict=True))
    found = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for p, d in zip(model.parameters(), directions, strict=True):
                p.add_(d, alpha=step)
            found.append(loss().item())
    return [(found[0] - found[1]) / 2e-5, float(told), float(after[0])]


@pytest.mark.library
@pytest.mark.parametrize("mesh", [(2, 1), (2, 2)], ids=str)
def test_of_each_ranks_tokens(pool, mesh) -> None:
    for wrong in pool.run(_spread, mesh, ranks=mesh[0] * mesh[1]):
        assert wrong == {}


def test_dropout_of_tiles_is_drawn_again_and_keeps_ranks_in_step(pool) -> None:
    (wanted, found, first), (_, _, second) = pool.run(_with_dropout, ranks=2)
    assert abs(found - wanted) <= 1e-6 * abs(wanted) and abs(wanted) > 1e-3
    assert first == second


# Libraries ---------------------------------------------------------------------------------------

OF_TRANSFORMERS = ["ViT", "DINOv3", "CLIP", "SigLIP", "Llama", "Qwen3", "Gemma 2", "Gemma 3"]
OF_TRANSFORMERS += ["DeepSeek-V3"]


MLPS = {"mlp", "ff", "ff_context", "ffn", "img_mlp", "txt_mlp"}


def library_of(kind: str) -> str:
    if kind in diffusers_models.MODELS:
        return "diffusers"
    return "transformers" if kind in OF_TRANSFORMERS else "timm"


def of_library(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    images = {"x": random(2, 3, 40, 40, seed=1)}
    if kind == "torchvision":
        return of_torchvision(), images
    if kind in TIMM:
        return of_timm(kind), images
    if kind in diffusers_models.MODELS:
        return diffusers_models.MODELS[kind]()
    return model_of(kind), inputs_of(kind, None)


OF_VISION = ["torchvision", "class token", "rotations", "relative positions"]


@pytest.mark.library
@pytest.mark.parametrize("kind", [*OF_TRANSFORMERS, *OF_VISION, *diffusers_models.MODELS])
def test_known_models(kind: str) -> None:
    libraries.library(library_of(kind))
    model, inputs = of_library(kind)
    ours = usp.replace_mlp(copy.deepcopy(model), 3)
    mlps = [name for name, module in ours.named_modules() if "forward" in vars(module)]
    assert mlps and {name.rpartition(".")[2] for name in mlps} <= MLPS
    with diffusers_models.fp64():
        wanted, found = (doors.results(each, inputs) for each in (model, ours))
    wrong = doors.errors(wanted, found)
    assert {name: error for name, error in wrong.items() if error > 3e-6} == {}


def _on_ranks(kind: str) -> dict[str, float]:
    mesh = workers.mesh(1, 2)
    model, inputs = of_library(kind)
    with diffusers_models.fp64():
        return doors.compared(model, inputs, mesh, lambda m: usp.parallelize(m, mesh, tiles=3))


@pytest.mark.library
@pytest.mark.parametrize("kind", ["Llama", "class token", "Flux"])
def test_known_models_on_ranks(pool, kind: str) -> None:
    libraries.library(library_of(kind))
    for wrong in pool.run(_on_ranks, kind, ranks=2):
        assert wrong == {}


@pytest.mark.library
@pytest.mark.parametrize("kind", ["gpt-oss", "BERT"])
def test_models_whose_mlp_is_no_module_of_one_tensor(kind: str) -> None:
    libraries.library("transformers")
    with pytest.raises(ValueError, match="is known to be an MLP that returns one tensor"):
        usp.replace_mlp(of_library(kind)[0], 2)


def _language_model(kind: str) -> dict[str, float]:
    """The page's: MLPs and the loss in tiles, of tokens that are cut, against the model's own."""
    mesh, model = workers.mesh(1, 2), model_of(kind)
    ids = inputs_of(kind, None)["input_ids"]
    whole = copy.deepcopy(model)
    wanted = whole(input_ids=ids, labels=ids).loss
    wanted.backward()
    usp.parallelize(model.model, mesh, outputs="local", tiles=3)
    batch = usp.cut_batch({"input_ids": ids, "labels": ids}, mesh, "zigzag")
    given = {name: batch[name] for name in ("input_ids", "position_ids", "spread")}
    hidden = model.model(**given).last_hidden_state
    options = {"softcap": model.config.final_logit_softcapping} if kind == "Gemma 2" else {}
    head = model.lm_head.weight
    loss = usp.tiled_cross_entropy(hidden, head, batch["labels"], mesh, tiles=2, **options)
    loss.backward()
    usp.all_reduce_gradients(model, mesh)
    pairs = zip(whole.named_parameters(), model.parameters(), strict=True)
    wrong = {name: ((p.grad - q.grad).norm() / p.grad.norm()).item() for (name, p), q in pairs}
    return wrong | {"loss": abs(loss.item() - wanted.item())}


@pytest.mark.library
@pytest.mark.parametrize("kind", ["Llama", "Gemma 2"])
def test_a_language_model_in_tiles(pool, kind: str) -> None:
    """Gemma 2 caps its logits, and its head is its embedding; the libraries' losses are in fp32."""
    libraries.library("transformers")
    for wrong in pool.run(_language_model, kind, ranks=2):
        assert {name: error for name, error in wrong.items() if not error <= 1e-5} == {}
