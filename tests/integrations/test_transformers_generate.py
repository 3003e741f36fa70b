"""``generate`` of models of transformers whose keys and values are cut over ranks."""

from __future__ import annotations

from typing import Any

import libraries
import pool as workers
import pytest
import torch
from pool import RemoteError
from torch import Tensor
from transformers_models import inputs_of, model_of

import usp
from usp.integrations import transformers as door

pytestmark = pytest.mark.library
NEW = 13
KINDS = ["Llama", "Qwen3", "gpt-oss", "DeepSeek-V3"]
# of which eager attention alone is right, which in fp64 is NaN in rows that see nothing
OF_EAGER = ("gpt-oss", "Gemma 2")
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_p": 0.9},
    "beams": {"do_sample": False, "num_beams": 3},
    "chunks": {"do_sample": False, "prefill_chunk_size": 10},
    "several": {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2},
}


def generated(kind: str, model: Any, way: str, **options: Any) -> Tensor:
    inputs = inputs_of(kind, None if kind in OF_EAGER else "left")
    torch.manual_seed(3)
    return model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, **WAYS[way], **options)


def _generated(kind: str, way: str, mesh: tuple[int, int], layout: str | None) -> Tensor:
    placed, model = workers.mesh(*mesh), model_of(kind)
    if layout is not None:
        usp.parallelize(model, placed, layout=layout)
    cache = door.sharded_cache(placed)
    text = generated(kind, model, way, cache=cache, use_cache=True)
    for layer in cache.layers:
        counts = layer.held.layout.counts
        assert layer.held.k.shape[1] == counts[placed.rank]
        assert layer.held.length == 27 + NEW - 1  # the last token is never looked at
        if layout is not None:  # else a page, which is longer than this text, on one rank
            assert min(counts) >= (10 if way == "chunks" else 27) // 2
    return text


CASES = [
    (kind, way, mesh, layout)
    for kind in KINDS
    for way, mesh, layout in [
        ("greedy", (1, 2), "zigzag"),
        ("sampled", (2, 1), "contiguous"),
        ("sampled", (1, 2), None),
        ("beams", (1, 2), "contiguous"),
        ("several", (1, 2), "zigzag"),
        ("chunks", (1, 2), "zigzag"),
    ]
]
CASES += [(kind, "sampled", (1, 2), "zigzag") for kind in ("Gemma 2", "Gemma 3")]


@pytest.mark.parametrize(("kind", "way", "mesh", "layout"), CASES)
def test_the_same_tokens_as_on_one_device(pool, kind, way, mesh, layout) -> None:
    libraries.library("transformers")
    theirs = model_of(kind, "eager" if kind in OF_EAGER else "sdpa")
    wanted = generated(kind, theirs, way, use_cache=True)
    assert wanted.shape[1] == 27 + NEW and len(set(wanted[0, 27:].tolist())) > 1
    for found in pool.run(_generated, kind, way, mesh, layout, ranks=2):
        assert torch.equal(found, wanted)


def _short_of_window(prompt: int) -> list[Tensor]:
    """A text that grows far beyond the window of gpt-oss, which drops what it does not see."""
    placed, model, texts = workers.mesh(1, 2), model_of("gpt-oss"), []
    ids = inputs_of("Llama", None)["input_ids"][:1, :prompt]
    for cache in (None, door.sharded_cache(placed)):
        options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
        given = {} if cache is None else {"cache": cache}
        if cache is not None:
            usp.parallelize(model, placed)
            _with_pages_of_two(cache, placed)
        mask = torch.ones_like(ids)
        texts.append(model.generate(ids, attention_mask=mask, use_cache=True, **options, **given))
    sliding, full = (layer.held for layer in cache.layers)
    assert (sliding.window, full.window) == (7, None)
    assert sum(sliding.layout.counts) < 40 < sum(full.layout.counts) == prompt + 39
    return texts


def _with_pages_of_two(cache: Any, mesh: Any) -> None:
    make = cache.layer_class_to_replicate

    def small() -> Any:
        layer = make()
        layer.held = usp.ShardedCache(mesh, page=2)
        return layer

    cache.layer_class_to_replicate = small


def test_layers_with_a_window_drop_what_they_do_not_see(pool) -> None:
    libraries.library("transformers")
    for whole, found in pool.run(_short_of_window, 9, ranks=2):
        assert torch.equal(whole, found)


def _goes_on(change: str) -> tuple[Tensor, Tensor]:
    """A prompt that is used again, with more tokens at once."""
    placed, model = workers.mesh(1, 2), model_of("Qwen3")
    ids = inputs_of("Llama", None)["input_ids"]
    whole = model(ids, use_cache=False).logits[:, -6:]
    usp.parallelize(model, placed)
    cache = door.sharded_cache(placed)
    with torch.no_grad():
        model(ids[:, :-6], cache=cache, use_cache=True)
        if change == "crop":
            model(ids[:, :3], cache=cache, use_cache=True)
            cache.crop(-3)
        elif change == "reset":
            cache.reset()
            model(ids[:, :-6], cache=cache, use_cache=True)
        else:
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 2]))
        return whole, model(ids[:, -6:], cache=cache, use_cache=True).logits


@pytest.mark.parametrize("change", ["crop", "reset", "repeat"])
def test_more_tokens_come_to_what_is_there(pool, change) -> None:
    libraries.library("transformers")
    for whole, found in pool.run(_goes_on, change, ranks=2):
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)


def _refused(case: str) -> None:
    placed = workers.mesh(1, 2)
    kind = "DeepSeek-V3" if case == "latents" else "Llama"
    model = model_of(kind, "sdpa" if case in ("attention", "latents") else "usp")
    ids = inputs_of("Llama", None)["input_ids"]
    cache = door.sharded_cache(None if case == "mesh" else placed)
    options: dict[str, Any] = {}
    if case in ("mesh", "striped"):
        usp.parallelize(model, placed, layout="striped" if case == "striped" else "contiguous")
    if case == "right":
        options["attention_mask"] = inputs_of("Llama", "right")["attention_mask"]
    if case == "square":
        options["attention_mask"] = torch.ones(2, 1, 27, 27, dtype=torch.bool).tril()
    if case == "offload":
        model(ids, cache=cache, use_cache=True)
        cache.layers[0].offload()
    model(ids, cache=cache, use_cache=True, **options)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("attention", 'attn_implementation="usp"'),
        ("latents", 'attn_implementation="usp"'),
        ("mesh", "the cache over None"),
        ("striped", "a run for each token"),
        ("right", "on the left"),
        ("square", "a mask that is Tensor"),
        ("offload", "stays on its device"),
    ],
)
def test_what_cannot_be_right_is_refused(pool, case, message) -> None:
    libraries.library("transformers")
    with pytest.raises(RemoteError, match=message):
        pool.run(_refused, case, ranks=2)
