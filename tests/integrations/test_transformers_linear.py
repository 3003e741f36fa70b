"""Models of transformers with layers of gated DeltaNet beside softmax: Qwen3-Next and Qwen3.5."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

import doors
import libraries
import pool as workers
import pytest
import torch
import torch.nn.functional as F
from pool import RemoteError
from torch import Tensor, nn

import usp
from usp.integrations import transformers as door

pytestmark = pytest.mark.library
MESHES = [(2, 1), (1, 2), (2, 2)]
TOKENS = 27
DOCUMENTS = (0, 10, 11, 20, TOKENS)
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 61}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "intermediate_size": 40}
SIZES |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6}
SIZES |= {"linear_value_head_dim": 5, "use_cache": False}
SIZES["layer_types"] = ["linear_attention", "full_attention", "linear_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS |= {"shared_expert_intermediate_size": 24}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen3-Next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", SIZES | EXPERTS),
    "Qwen3.5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", SIZES),
    "Qwen3.5 MoE": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", SIZES | EXPERTS),
}


def model_of(kind: str) -> nn.Module:
    library = libraries.library("transformers")
    door.register()
    config, name, options = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(library, config)(**options)
    model = getattr(library, name)._from_config(config, attn_implementation="usp")
    model = doors.randomize(model, 0.3)
    if "num_experts" in options:
        model.set_experts_implementation("eager")
    return model.eval()


def inputs_of(padding: str | None) -> dict[str, Tensor]:
    ids = torch.randint(1, 61, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    if padding is None:
        return {"input_ids": ids}
    real = torch.ones(2, TOKENS, dtype=torch.int64)
    real[1, slice(20, None) if padding == "right" else slice(5)] = 0
    return {"input_ids": ids, "attention_mask": real}


class Real(nn.Module):
    """The outputs at tokens that are no padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        logits, real = self.model(**inputs).logits, inputs.get("attention_mask")
        return logits if real is None else logits[real.bool()]


def _compared(degrees: tuple[int, int], kind: str, padding: str | None) -> dict[str, float]:
    mesh, model = workers.mesh(*degrees), Real(model_of(kind))

    def spread(wrapped: nn.Module) -> None:
        usp.parallelize(wrapped.model, mesh, tiles=3 if kind == "Qwen3.5" else None)

    with doors.Doubled():
        return doors.compared(model, inputs_of(padding), mesh, spread)


CASES = [("Qwen3-Next", mesh, padding) for mesh in MESHES for padding in (None, "left")]
CASES += [
    ("Qwen3-Next", (2, 2), "right"),
    ("Qwen3.5", (2, 2), "left"),
    ("Qwen3.5 MoE", (1, 2), None),
]


@pytest.mark.parametrize(("kind", "mesh", "padding"), CASES)
def test_a_spread_model_is_the_whole_one(pool, kind, mesh, padding) -> None:
    """Beside transformers' own functions, in fp64: outputs and every gradient."""
    libraries.library("transformers")
    ranks = mesh[0] * mesh[1]
    for wrong in pool.run(_compared, mesh, kind, padding, ranks=ranks):
        assert wrong == {}


def _again(how: str) -> dict[str, float]:
    """Beside the same model on the same mesh, that computes nothing again."""
    mesh, model = workers.mesh(1, 2), Real(model_of("Qwen3-Next")).train()
    usp.parallelize(model.model, mesh)
    wanted = doors.results(model, inputs_of("left"))
    model.model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    return doors.errors(wanted, doors.results(model, inputs_of("left")))


@pytest.mark.parametrize("how", ["reentrant", "other"])
def test_checkpoints_compute_again(pool, how) -> None:
    libraries.library("transformers")
    for wrong in pool.run(_again, how, ranks=2):
        assert wrong == {}


def _in_a_region() -> dict[str, float]:
    """A linear layer alone, on tokens that were cut by hand."""
    mesh, layer = workers.mesh(1, 2), model_of("Qwen3-Next").model.layers[0].linear_attn
    spread = usp.Spread(mesh, seq_len=TOKENS)
    x = torch.randn(2, TOKENS, 32, generator=torch.Generator().manual_seed(1)).double()
    with doors.Doubled():
        wanted = layer(x)
        with usp.spread_attention(spread):
            found = layer(spread.shard(x))
    return doors.errors({"": wanted.detach()}, {"": spread.unshard(found).detach()})


def test_a_layer_in_a_region(pool) -> None:
    libraries.library("transformers")
    for wrong in pool.run(_in_a_region, ranks=2):
        assert wrong == {}


# Outputs that stay cut ----------------------------------------------------------------------------


def batch_of(what: str) -> dict[str, Tensor]:
    batch = inputs_of("left" if what == "padding" else None)
    batch["labels"] = batch["input_ids"].clone()
    if what == "padding":
        batch["labels"][1, :14] = -100  # ranks without a label
    if what == "documents":
        pieces = [torch.arange(b - a) for a, b in itertools.pairwise(DOCUMENTS)]
        batch["position_ids"] = torch.cat(pieces).expand(2, -1).contiguous()
        batch["labels"][:, list(DOCUMENTS[:-1])] = -100  # as their collator does it
    return batch


def whole_loss(model: nn.Module, batch: dict[str, Tensor], what: str) -> Tensor:
    """Documents one by one: theirs parts none without kernels of others."""
    ends = DOCUMENTS if what == "documents" else (0, TOKENS)
    given = {n: x for n, x in batch.items() if n in ("input_ids", "attention_mask")}
    logits = [
        model(**{n: x[:, a:b] for n, x in given.items()}).logits
        for a, b in itertools.pairwise(ends)
    ]
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return F.cross_entropy(torch.cat(logits, 1).flatten(0, 1), labels.flatten())


def _local(degrees: tuple[int, int] | None, what: str) -> dict[str, float]:
    mesh = None if degrees is None else workers.mesh(*degrees)
    model, batch = model_of("Qwen3-Next").train(), batch_of(what)
    ours = usp.parallelize(copy.deepcopy(model), mesh, outputs="local")
    with doors.Doubled():
        wanted = whole_loss(model, batch, what)
        wanted.backward()
        cut = usp.cut_batch(batch, mesh)
        out = ours(**cut)
        value = out.loss.detach().double()
        out.loss.backward()
    usp.all_reduce_gradients(ours, mesh)
    if mesh is not None:
        torch.distributed.all_reduce(value)
        assert out.logits.shape[1] == cut["spread"].local_seq_len
    gradients = [{n: p.grad for n, p in m.named_parameters()} for m in (model, ours)]
    wrong = doors.errors(*gradients)
    return wrong if abs(value - wanted) < 1e-9 else wrong | {"loss": (value - wanted).item()}


LOCAL = [(mesh, what) for mesh in ((2, 2), None) for what in ("plain", "padding", "documents")]


@pytest.mark.parametrize(("mesh", "what"), [*LOCAL, ((2, 1), "padding"), ((1, 2), "documents")])
def test_local_outputs_have_every_gradient_of_the_whole(pool, mesh, what) -> None:
    libraries.library("transformers")
    if mesh is None:
        assert _local(None, what) == {}
        return
    for wrong in pool.run(_local, mesh, what, ranks=mesh[0] * mesh[1]):
        assert wrong == {}


# Generation --------------------------------------------------------------------------------------

NEW = 9
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_p": 0.9},
    "beams": {"do_sample": False, "num_beams": 3},
    "chunks": {"do_sample": False, "prefill_chunk_size": 10},
}


def generated(model: nn.Module, way: str, padding: str | None, **options: Any) -> Tensor:
    torch.manual_seed(3)
    asked = {"max_new_tokens": NEW, "min_new_tokens": NEW, "use_cache": True} | WAYS[way]
    with doors.Doubled():
        return model.generate(**inputs_of(padding), **asked, **options)


def _generated(kind: str, mesh: tuple[int, int], way: str, padding: str | None) -> list[Tensor]:
    placed, model = workers.mesh(*mesh), model_of(kind)
    whole = generated(model, way, padding)
    usp.parallelize(model, placed)
    cache = door.sharded_cache(placed)
    found = generated(model, way, padding, cache=cache)
    assert cache.get_seq_length() == TOKENS + NEW - 1
    keys = cache.layers[1].held.k.shape[1]
    assert 5 <= keys <= 30, keys  # this rank's share; states are all on each
    assert cache.layers[0].recurrent_states[0].shape[1:] == (4, 6, 5)
    assert cache.layers[0].conv_states[0].shape[1:] == (44, 4)
    return [whole, found]


GENERATED = [
    ("Qwen3-Next", (1, 2), "greedy", "left"),
    ("Qwen3-Next", (2, 2), "sampled", None),
    ("Qwen3-Next", (1, 2), "beams", None),
    ("Qwen3-Next", (2, 1), "chunks", "left"),
    ("Qwen3.5", (1, 2), "sampled", "left"),
]


@pytest.mark.parametrize(("kind", "mesh", "way", "padding"), GENERATED)
def test_generates_the_tokens_of_one_device(pool, kind, mesh, way, padding) -> None:
    libraries.library("transformers")
    for whole, found in pool.run(_generated, kind, mesh, way, padding, ranks=mesh[0] * mesh[1]):
        assert whole.shape[1] == TOKENS + NEW and len(set(whole[0, TOKENS:].tolist())) > 1
        assert torch.equal(whole, found)


def _goes_on(prompt: int, change: str) -> dict[str, float]:
    """Prompts shorter than the convolution too; tokens by one, and several at once."""
    mesh, model, ids = workers.mesh(1, 2), model_of("Qwen3-Next"), inputs_of(None)["input_ids"]
    with doors.Doubled(), torch.no_grad():
        wanted = model(ids[:, : prompt + 4]).logits[:, prompt:]
        usp.parallelize(model, mesh)
        cache = door.sharded_cache(mesh)
        options = {"cache": cache, "use_cache": True}
        model(ids[:, :prompt], **options)
        if change == "reset":
            cache.reset()
            model(ids[:, :prompt], **options)
        elif change == "repeat":
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 3]))
        steps = [(prompt, prompt + 1), (prompt + 1, prompt + 4)]
        found = torch.cat([model(ids[:, a:b], **options).logits for a, b in steps], 1)
    return doors.errors({"": wanted}, {"": found})


@pytest.mark.parametrize(("prompt", "change"), [(3, ""), (20, "reset"), (11, "repeat")])
def test_more_tokens_come_to_what_is_there(pool, prompt, change) -> None:
    libraries.library("transformers")
    for wrong in pool.run(_goes_on, prompt, change, ranks=2):
        assert wrong == {}


# Refusals ----------------------------------------------------------------------------------------


def _refused(case: str) -> None:
    mesh, model = workers.mesh(1, 2), model_of("Qwen3-Next")
    inputs: dict[str, Any] = inputs_of(None)
    if case == "local":
        usp.parallelize(model, mesh, outputs="local")
        model(**usp.cut_batch({"input_ids": inputs["input_ids"][:, :3]}, mesh))
    usp.parallelize(model, mesh, layout="zigzag" if case == "zigzag" else "contiguous")
    if case == "cache":
        inputs["use_cache"] = True
    elif case == "documents":
        inputs["cu_seq_lens_q"] = torch.tensor(DOCUMENTS)
    elif case in ("other mesh", "past"):
        cache = door.sharded_cache(None if case == "other mesh" else mesh)
        model(**inputs, cache=cache, use_cache=True)
        cache.activate_past_recording()
    elif case == "by hand":
        cache = transformers_cache(model)
        with usp.spread_attention(usp.Spread(mesh, seq_len=TOKENS)):
            x = torch.zeros(2, 14 - mesh.rank, 32).double()
            model.model.layers[0].linear_attn(x, cache=cache)
    model(**inputs)


def transformers_cache(model: nn.Module) -> Any:
    return libraries.library("transformers").DynamicCache(config=model.config)


REFUSED = {
    "zigzag": "by the order of the sequence: layout must be 'contiguous'.* got 'zigzag'",
    "cache": r"model\.layers\.0 \(Qwen3NextDecoderLayer\) is given cache",
    "documents": "say which documents there are to usp.cut_batch",
    "other mesh": "and the cache over None",
    "past": "records no past",
    "by hand": "a cache of states, which would be of this rank's tokens alone",
    "local": r"ranks hold \(2, 1\) tokens.*no padding from a linear layer of a single one",
}


@pytest.mark.parametrize(("case", "message"), REFUSED.items())
def test_what_cannot_be_right_is_refused(pool, case, message) -> None:
    libraries.library("transformers")
    for outcome in pool.outcomes(_refused, case, ranks=2):
        assert isinstance(outcome, RemoteError), outcome
        assert outcome.kind in ("ValueError", "NotImplementedError"), outcome.message
        assert re.search(message, outcome.message), outcome.message


def _of_another_transformers() -> None:
    models = libraries.library("transformers.models.qwen3_next.modeling_qwen3_next")
    model = model_of("Qwen3-Next")
    forward = models.Qwen3NextGatedDeltaNet.forward
    try:
        models.Qwen3NextGatedDeltaNet.forward = lambda self, x, **_: self.conv1d(x)
        usp.parallelize(model, workers.mesh(1, 2))
    finally:
        models.Qwen3NextGatedDeltaNet.forward = forward


def test_layers_that_call_something_else_are_refused(pool) -> None:
    libraries.library("transformers")
    with pytest.raises(RemoteError, match="does not call causal_conv1d_fn"):
        pool.run(_of_another_transformers, ranks=2)
