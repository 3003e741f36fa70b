"""Models of transformers, tiny and random, with attn_implementation="usp", their tokens spread."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import compiling
import doors
import libraries
import pool as workers
import pytest
import torch
from integration_models import random
from pool import RemoteError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers_models import MODELS, OF_IMAGES, TOKENS, VISION, inputs_of, model_of

import usp
from usp.integrations import transformers as door

pytestmark = pytest.mark.library
MESHES = [(2, 1), (1, 2), (2, 2)]
PADDED = [(kind, side) for kind in MODELS for side in (None, "left", "right")]
PADDED = [(kind, side) for kind, side in PADDED if side is None or kind not in OF_IMAGES]
# what these libraries compute in fp32, whatever is asked for, differs by its rounding
LOOSE = {"Gemma 2": 3e-6, "Gemma 3": 3e-6, "DeepSeek-V3": 3e-6}


class Real(nn.Module):
    """The outputs at tokens that are no padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        out = self.model(**inputs)
        if "return_loss" in inputs:
            return out.loss, out.logits_per_image, out.text_embeds, out.image_embeds
        real = inputs.get("attention_mask")
        if real is None:
            return out[0], out.get("pooler_output")
        return out[0][real.bool()]


def _compared(
    mesh: tuple[int, int], layout: str, kind: str, padding: str | None
) -> dict[str, float]:
    placed = workers.mesh(*mesh)
    model, inputs = Real(model_of(kind)), inputs_of(kind, padding)

    def spread(wrapped: nn.Module) -> None:
        usp.parallelize(wrapped.model, placed, layout=layout)

    wrong = doors.compared(model, inputs, placed, spread)
    return {name: error for name, error in wrong.items() if not error <= LOOSE.get(kind, 1e-9)}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(("kind", "padding"), PADDED)
def test_a_spread_model_is_the_whole_one(pool, kind, padding, mesh) -> None:
    layout = {(2, 1): "contiguous", (1, 2): "zigzag", (2, 2): "striped"}[mesh]
    ranks = mesh[0] * mesh[1]
    for wrong in pool.run(_compared, mesh, layout, kind, padding, ranks=ranks):
        assert wrong == {}


@pytest.mark.parametrize(("kind", "padding"), [case for case in PADDED if case[1] != "right"])
def test_on_one_device_it_is_what_transformers_computes(kind, padding) -> None:
    """Eager attention, part of which they compute in fp32: outputs and every gradient."""
    ours, theirs = model_of(kind), model_of(kind, "eager")
    inputs = inputs_of(kind, padding)
    if padding:  # in fp64 theirs is NaN in rows that see nothing
        ours, theirs = ours.float(), theirs.float()
    wanted, found = (doors.results(Real(model), inputs) for model in (theirs, ours))
    assert doors.errors(wanted, found, 1e-5) == {}


def _beside_eager(mesh: tuple[int, int], layout: str) -> dict[str, float]:
    placed, kind = workers.mesh(*mesh), "DeepSeek-V3 at 192 / 128"
    wanted = doors.results(Real(model_of(kind, "eager")), inputs_of(kind, None))
    model = Real(model_of(kind))
    assert model.model.model.layers[0].self_attn.qk_head_dim == 192
    usp.parallelize(model.model, placed, layout=layout)
    found = doors.results(
        model, inputs_of(kind, None), lambda m: usp.all_reduce_gradients(m, placed)
    )
    return doors.errors(wanted, found, 1e-5)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_latent_attention_of_full_size_beside_eager(pool, mesh) -> None:
    libraries.library("transformers")
    layout = {(2, 1): "contiguous", (1, 2): "zigzag", (2, 2): "striped"}[mesh]
    for wrong in pool.run(_beside_eager, mesh, layout, ranks=mesh[0] * mesh[1]):
        assert wrong == {}


def test_generation_on_one_device_goes_on() -> None:
    ids = inputs_of("Llama", None)["input_ids"][:1, :5]
    for kind in ("Llama", "Gemma 2", "DeepSeek-V3"):
        texts = []
        for implementation in ("usp", "eager"):
            model = model_of(kind, implementation)
            options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
            texts.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options))
        assert torch.equal(*texts) and texts[0].shape == (1, 11)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_registers_on_several_ranks(pool, layout) -> None:
    """Of eleven tokens of a prefix before four patches: ranks hold several, one or none."""
    libraries.library("transformers")
    for wrong in pool.run(_of_a_long_prefix, layout, ranks=4):
        assert wrong == {}


def _of_a_long_prefix(layout: str) -> dict[str, float]:
    library = libraries.library("transformers")
    door.register()
    config = library.DINOv3ViTConfig(**VISION | {"image_size": 16, "num_register_tokens": 10})
    model = library.DINOv3ViTModel._from_config(config, attn_implementation="usp")
    model, mesh = doors.randomize(model).eval(), workers.mesh(2, 2)
    images = {"pixel_values": random(2, 3, 16, 16, seed=1)}
    return doors.compared(model, images, mesh, lambda m: usp.parallelize(m, mesh, layout=layout))


def test_samples_are_dropped_alike_under_any_name_of_the_class() -> None:
    library = libraries.library("transformers")
    config = library.DINOv3ViTConfig(**VISION, drop_path_rate=0.5)
    model = usp.parallelize(library.DINOv3ViTModel(config), None)
    kinds = {type(layer.drop_path.forward).__name__ for layer in model.model.layer}
    assert kinds == {"Samples"}


# Computed again, and compiled ---------------------------------------------------------------------


def _again(how: str, training: bool) -> dict[str, float]:
    mesh = workers.mesh(1, 2)
    model = Real(model_of("Llama")).train(training)

    def spread(wrapped: nn.Module) -> None:
        usp.parallelize(wrapped.model, mesh, layout="zigzag")
        if how != "compiled":
            options = {"use_reentrant": how == "reentrant"}
            wrapped.model.gradient_checkpointing_enable(options)

    def compiled(wrapped: nn.Module) -> nn.Module:
        if how == "compiled":
            wrapped.model.forward = torch.compile(wrapped.model.forward, backend="aot_eager")
        return wrapped

    with compiling.afresh():
        return doors.compared(model, inputs_of("Llama", "left"), mesh, spread, compiled)


@pytest.mark.parametrize("how", ["reentrant", "other", "compiled"])
def test_checkpoints_and_graphs(pool, how) -> None:
    libraries.library("transformers")
    for wrong in pool.run(_again, how, how != "compiled", ranks=2):
        assert wrong == {}


# Masks -------------------------------------------------------------------------------------------


class Squares(TorchDispatchMode):
    """Counts tensors by query and key, of the tokens of all or of a rank."""

    lengths, found = {101, 51, 50}, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.found += sum(sum(n in self.lengths for n in x.shape) > 1 for x in made)
        return out


def _squares(kind: str, implementation: str) -> int:
    model = usp.parallelize(model_of(kind, implementation), workers.mesh(1, 2))
    ids = torch.randint(1, 61, (2, 101), generator=torch.Generator().manual_seed(1))
    real = torch.ones(2, 101, dtype=torch.int64)
    real[1, :9] = 0
    with Squares() as watched:
        model(input_ids=ids, attention_mask=real).logits.sum().backward()
    return watched.found


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "BERT"])
def test_no_mask_is_a_square(pool, kind) -> None:
    """Which those of "sdpa" are."""
    libraries.library("transformers")
    assert pool.run(_squares, kind, "usp", ranks=2) == [0, 0]
    assert min(pool.run(_squares, kind, "sdpa", ranks=2)) > 0


# Packed documents --------------------------------------------------------------------------------

DOCUMENTS = (0, 10, 11, 20, TOKENS)


def _packed(kind: str) -> dict[str, Tensor]:
    model = model_of(kind)
    usp.parallelize(model, workers.mesh(1, 2), layout="zigzag")
    ids = inputs_of(kind, None)["input_ids"][:1]
    lengths = torch.tensor(DOCUMENTS).diff().tolist()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"logits": model(input_ids=ids, position_ids=positions).logits.detach()}


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "DeepSeek-V3"])
def test_packed_documents_are_the_documents_one_by_one(pool, kind) -> None:
    libraries.library("transformers")
    model, ids = model_of(kind), inputs_of(kind, None)["input_ids"][:1]
    parts = [model(input_ids=ids[:, a:b]).logits for a, b in itertools.pairwise(DOCUMENTS)]
    wanted = {"logits": torch.cat(parts, 1).detach()}
    for found in pool.run(_packed, kind, ranks=2):
        assert doors.errors(wanted, found) == {}


# Refusals ----------------------------------------------------------------------------------------


def _refused(case: str) -> None:
    kind = "Qwen3" if case == "function" else "Llama"
    model, inputs = model_of(kind), inputs_of(kind, None)
    whole = copy.deepcopy(model)
    usp.parallelize(model, workers.mesh(1, 2))
    if case == "cache":
        model(**inputs, use_cache=True)
    elif case == "hidden states":
        model(**inputs, output_hidden_states=True)
    elif case == "function":
        masking = libraries.library("transformers.masking_utils")
        options = {"and_mask_function": lambda b, h, q, k: (q - k) % 2 == 0}
        embedded = random(2, TOKENS, 48, seed=1)
        mask = masking.create_causal_mask(model.config, embedded, None, None, **options)
        masks = {"full_attention": mask, "sliding_attention": mask}
        whole(**inputs | {"attention_mask": masks})
        model(**inputs | {"attention_mask": masks})
    elif case == "square":
        mask = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
        found = model(**inputs, attention_mask=mask).logits
        assert doors.errors({"": whole(**inputs).logits}, {"": found}) == {}
    else:
        mask = torch.ones(2, 1, 14, 14, dtype=torch.bool).tril()
        model(**inputs, attention_mask=mask)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("cache", r"model\.layers\.0 \(LlamaDecoderLayer\) is given cache, .* 14 of 27 tokens"),
        (
            "hidden states",
            r"returns what model\.layers\.0 \(LlamaDecoderLayer\) does, \(2, 14, 48\)",
        ),
        ("function", "a mask by a function of your own"),
        ("local", r"attn_mask is \(2, 1, 14, 14\) where this rank holds 14 of 27"),
    ],
)
def test_what_cannot_be_right_is_refused(pool, case, message) -> None:
    libraries.library("transformers")
    with pytest.raises(RemoteError, match=message):
        pool.run(_refused, case, ranks=2)


def test_a_square_of_the_whole_is_right_as_it_stands(pool) -> None:
    libraries.library("transformers")
    pool.run(_refused, "square", ranks=2)


def test_the_command_that_installs_it_is_named(monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'usp\[transformers\]'"):
        door.register()
