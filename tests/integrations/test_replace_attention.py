"""usp.replace_attention on models built on nn.MultiheadAttention, on one device and on meshes."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import pool as workers
import pytest
import torch
from integration_models import F64, WIDTH, make_encoder, random
from torch import Tensor, nn

import usp

MESHES = [(1, 2), (2, 1), (2, 2), (1, 3), (3, 2)]
BATCH, SOURCE, TARGET = 2, 23, 11


class Block(nn.Module):
    """An encoder block as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attention = nn.MultiheadAttention(WIDTH, 3, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """Patches, a class token, positions, blocks, a head: 5 x 5 patches make 26 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, WIDTH, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embedding = nn.Parameter(torch.randn(1, 26, WIDTH))
        self.layers = nn.Sequential(Block(), Block())
        self.ln, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_proj(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(len(x), -1, -1), x), 1) + self.pos_embedding
        return self.head(self.ln(self.layers(x))[:, 0])


@dataclass(frozen=True)
class Whole:
    """One device: every tensor is whole, and torch's modules stay."""

    def model(self, model: nn.Module) -> nn.Module:
        return model

    def cut(self, x: Tensor, dim: int) -> Tensor:
        return x

    def join(self, x: Tensor, dim: int, seq_len: int) -> Tensor:
        return x


@dataclass(frozen=True)
class Spread:
    """A rank of a mesh."""

    mesh: usp.SequenceMesh
    layout: str
    seq_len: Any = "infer"

    def model(self, model: nn.Module) -> nn.Module:
        return usp.replace_attention(model, self.mesh, layout=self.layout, seq_len=self.seq_len)

    def cut(self, x: Tensor, dim: int) -> Tensor:
        return usp.shard_sequence(x, self.mesh, dim, self.layout)

    def join(self, x: Tensor, dim: int, seq_len: int) -> Tensor:
        return usp.unshard_sequence(x, self.mesh, dim, self.layout, seq_len)


Run = tuple[nn.Module, Tensor, Tensor]


def encoder(on: Whole | Spread, causal: bool, padding: str | None, training: bool) -> Run:
    """The model, its whole output, and a random cotangent."""
    model = on.model(make_encoder().train(training))
    options: dict[str, Any] = {}
    if causal:
        mask = nn.Transformer.generate_square_subsequent_mask(SOURCE, dtype=F64)
        options = {"mask": on.cut(mask, 0), "is_causal": True}
    if padding:
        ignored = torch.arange(SOURCE).expand(BATCH, -1) >= torch.tensor([[17], [SOURCE]])
        if padding == "float":
            ignored = torch.zeros(BATCH, SOURCE, dtype=F64).masked_fill(ignored, -torch.inf)
        options["src_key_padding_mask"] = on.cut(ignored, 1)
    out = model(on.cut(random(BATCH, SOURCE, WIDTH, seed=1), 1), **options)
    return model, on.join(out, 1, SOURCE), random(BATCH, SOURCE, WIDTH, seed=2)


def transformer(on: Whole | Spread, is_causal: bool | None) -> Run:
    """Encoder and decoder, self- and cross-attention, sequence first, and every mask."""
    torch.manual_seed(0)
    model = on.model(nn.Transformer(WIDTH, 4, 2, 2, 16, 0.0, dtype=F64))
    hidden = torch.ones(TARGET, TARGET, dtype=torch.bool).triu(1)
    ignored = torch.arange(SOURCE).expand(BATCH, -1) >= torch.tensor([[17], [SOURCE]])
    out = model(
        on.cut(random(SOURCE, BATCH, WIDTH, seed=1), 0),
        on.cut(random(TARGET, BATCH, WIDTH, seed=2), 0),
        src_mask=on.cut(random(SOURCE, SOURCE, seed=3), 0),
        tgt_mask=on.cut(hidden, 0),
        memory_mask=on.cut(random(TARGET, SOURCE, seed=4) < -1, 0),
        memory_key_padding_mask=on.cut(ignored, 1),
        tgt_is_causal=is_causal,
    )
    return model, on.join(out, 0, TARGET), random(TARGET, BATCH, WIDTH, seed=5)


def vision_transformer(on: Whole | Spread) -> Run:
    """Tokens are cut where the blocks begin, and joined where they end."""
    torch.manual_seed(0)
    model = on.model(VisionTransformer().double())
    model.layers.register_forward_pre_hook(lambda _, inputs: (on.cut(inputs[0], 1),))
    model.layers.register_forward_hook(lambda _, inputs, output: on.join(output, 1, 26))
    return model, model(random(BATCH, 3, 20, 20, seed=1)), random(BATCH, 7, seed=2)


def results(run: Run, ranks: int = 1) -> dict[str, Tensor]:
    """The whole output; of the gradients this rank's part."""
    model, out, cotangent = run
    parameters = dict(model.named_parameters())
    # every rank has the whole output: each one's loss is a share
    grads = torch.autograd.grad(out, list(parameters.values()), cotangent / ranks)
    return {"output": out.detach()} | dict(zip(parameters, grads, strict=True))


def on_worker(mesh: tuple[int, int], layout: str, scenario: str, *args: Any) -> dict[str, Tensor]:
    spread = Spread(workers.mesh(*mesh), layout)
    return results(globals()[scenario](spread, *args), spread.mesh.size)


def check(pool, mesh: tuple[int, int], layout: str, scenario: str, *args: Any) -> None:
    parts = pool.run(on_worker, mesh, layout, scenario, *args, ranks=mesh[0] * mesh[1])
    expected = results(globals()[scenario](Whole(), *args))
    for name, tensor in expected.items():
        if name == "output":
            ours = [part[name] for part in parts]
        else:
            ours = [sum(part[name] for part in parts)]
        for result in ours:
            torch.testing.assert_close(
                result, tensor, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.fixture
def plain_path():
    """torch on its plain way."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("mesh", "layout"), [((2, 2), "zigzag"), ((1, 3), "striped")])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_encoder_on_a_mesh(pool, mesh, layout, causal, padding, training) -> None:
    check(pool, mesh, layout, "encoder", causal, padding, training)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("is_causal", [None, False, True])
@pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:enable_nested_tensor is True")
def test_transformer_on_a_mesh(pool, mesh, is_causal) -> None:
    check(pool, mesh, "zigzag", "transformer", is_causal)


def _with_lengths(seq_len: Any) -> dict[str, Tensor]:
    spread = Spread(workers.mesh(2, 2), "zigzag", seq_len)
    return results(transformer(spread, None), spread.mesh.size)


def assert_as_whole(parts: list[dict[str, Tensor]]) -> None:
    expected = results(transformer(Whole(), None))
    for part in parts:
        torch.testing.assert_close(part["output"], expected["output"], rtol=1e-9, atol=1e-9)
    for name in expected.keys() - {"output"}:
        total = sum(part[name] for part in parts)
        torch.testing.assert_close(total, expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seq_len", [(SOURCE, TARGET), None])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_transformer_has_lengths_of_source_and_target(pool, seq_len) -> None:
    assert_as_whole(pool.run(_with_lengths, seq_len, ranks=4))


class TwoLayouts(Spread):
    """Source and target lie differently."""

    def _as_held(self, seq_len: int) -> Spread:
        return Spread(self.mesh, self.layout[0 if seq_len == SOURCE else 1])

    def cut(self, x: Tensor, dim: int) -> Tensor:
        return self._as_held(x.shape[dim]).cut(x, dim)

    def join(self, x: Tensor, dim: int, seq_len: int) -> Tensor:
        return self._as_held(seq_len).join(x, dim, seq_len)


def _with_layouts() -> dict[str, Tensor]:
    layouts: Any = usp.Held((SOURCE - 2, 0, 2, 0)), "zigzag"
    spread = TwoLayouts(workers.mesh(2, 2), layouts, None)
    return results(transformer(spread, None), spread.mesh.size)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_transformer_has_layouts_of_source_and_target(pool) -> None:
    assert_as_whole(pool.run(_with_layouts, ranks=4))


def test_each_layer_is_told_the_lengths_it_has() -> None:
    model = nn.Transformer(WIDTH, 4, 1, 1, 16, batch_first=True)
    model.pool = nn.MultiheadAttention(WIDTH, 4)
    usp.replace_attention(model, seq_len=(SOURCE, TARGET))
    decoder = model.decoder.layers[0]
    assert model.encoder.layers[0].self_attn.placement.seq_len == SOURCE
    assert decoder.self_attn.placement.seq_len == TARGET
    assert decoder.multihead_attn.placement.seq_len == (TARGET, SOURCE)
    assert model.pool.placement.seq_len == (SOURCE, TARGET)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_vision_transformer_on_a_mesh(pool, mesh) -> None:
    check(pool, mesh, "contiguous", "vision_transformer")


def _evaluated(layout: str, way: str, padded: bool) -> Tensor:
    """The encoder in evaluation, on the ways by which torch would pass us by."""
    spread = Spread(workers.mesh(2, 2), layout)
    model = _for_evaluation(spread.model(make_encoder()), way)
    x = spread.cut(random(BATCH, SOURCE, WIDTH, seed=1), 1)
    ignored = spread.cut(_left_aligned(), 1) if padded else None
    with torch.set_grad_enabled(way == "frozen"):
        return spread.join(model(x, src_key_padding_mask=ignored), 1, SOURCE)


def _for_evaluation(model: nn.Module, way: str) -> nn.Module:
    return model.eval().requires_grad_(way != "frozen")


def _left_aligned() -> Tensor:
    return torch.arange(SOURCE).expand(BATCH, -1) >= torch.tensor([[17], [SOURCE]])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("way", ["no_grad", "frozen"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_evaluation_on_a_mesh(pool, way, padded) -> None:
    model = _for_evaluation(make_encoder(), way)
    ignored = _left_aligned() if padded else None
    with torch.no_grad():
        expected = model(random(BATCH, SOURCE, WIDTH, seed=1), src_key_padding_mask=ignored)
    for out in pool.run(_evaluated, "zigzag", way, padded, ranks=4):
        if padded:  # torch's fused path writes 0 where there is padding
            out = out.masked_fill(ignored[..., None], 0.0)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def _replaced(when: str, norm_first: bool) -> nn.Module:
    """An encoder with our attention, that came into it in one of many ways."""
    if when in ("layer", "attention"):
        layer = make_encoder(norm_first=norm_first).layers[0]
        usp.replace_attention(layer if when == "layer" else layer.self_attn)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="enable_nested_tensor is True")
            return nn.TransformerEncoder(layer, 2, enable_nested_tensor=when == "layer")
    model = usp.replace_attention(make_encoder(norm_first=norm_first))
    if when == "copied":
        return copy.deepcopy(model)
    if when == "pickled":
        model = pickle.loads(pickle.dumps(model))
        for layer in model.layers:  # a hook of another's may come and go
            layer.self_attn.register_forward_pre_hook(lambda *_: None).remove()
    return model


WAYS_IN = [("layer", False), ("layer", True), ("model", False), ("model", True)]
WAYS_IN += [("attention", False), ("copied", False), ("pickled", True)]


@pytest.mark.parametrize(("when", "norm_first"), WAYS_IN)
@pytest.mark.parametrize("way", ["no_grad", "inference", "frozen"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_fused_paths_are_bypassed(monkeypatch, when, way, padded, norm_first) -> None:
    calls = []
    real = usp.MultiheadAttention.forward

    def spy(self, *args, **options):
        calls.append(self)
        return real(self, *args, **options)

    monkeypatch.setattr(usp.MultiheadAttention, "forward", spy)
    model = _for_evaluation(_replaced(when, norm_first), way)
    ignored = _left_aligned() if padded else None
    with torch.inference_mode() if way == "inference" else torch.set_grad_enabled(way == "frozen"):
        out = model(random(BATCH, SOURCE, WIDTH, seed=1), src_key_padding_mask=ignored)
    assert calls == [layer.self_attn for layer in model.layers]
    assert not out.is_nested and out.shape == (BATCH, SOURCE, WIDTH)


def test_replaces_in_place() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
            self.again = self.first
            self.more = nn.ModuleDict({"a": nn.MultiheadAttention(8, 4, kdim=3).eval()})
            self.aside = [self.more["a"]]
            self.other = nn.Linear(8, 8)

    model = Model()
    calls = []
    model.first.register_forward_hook(lambda module, inputs, output: calls.append(module))
    modules, parameters = list(model.modules()), dict(model.named_parameters())
    keys = list(model.state_dict())
    assert usp.replace_attention(model, layout="zigzag", causal=True, chunks=2) is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert {n: id(p) for n, p in model.named_parameters()} == {
        n: id(p) for n, p in parameters.items()
    }
    assert list(model.state_dict()) == keys
    assert model.first is model.again and model.aside[0] is model.more["a"]
    for module in (model.first, model.more["a"]):
        assert type(module) is usp.MultiheadAttention
        assert (module.placement.layout, module.placement.causal) == ("zigzag", True)
        assert module.placement.chunks == 2
    assert model.first.batch_first and model.first.dropout == 0.1 and model.first.training
    assert not model.more["a"].training
    x = torch.randn(2, 5, 8)
    model.first(x, x, x)
    assert calls == [model.first]
    copy.deepcopy(model)


def test_the_model_may_be_one_itself_and_may_move() -> None:
    module = nn.MultiheadAttention(8, 2)
    assert usp.replace_attention(module) is module
    assert type(module) is usp.MultiheadAttention
    usp.replace_attention(nn.Sequential(module), layout="striped")
    assert module.placement.layout == "striped"


def test_nothing_is_skipped_silently() -> None:
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"known": nn.MultiheadAttention(8, 2), "unknown": Own(8, 2)})
    with pytest.raises(NotImplementedError, match=r"cannot replace unknown: .*Own"):
        usp.replace_attention(model)
    assert type(model["known"]) is nn.MultiheadAttention
    with pytest.raises(ValueError, match=r"Linear holds no nn\.MultiheadAttention"):
        usp.replace_attention(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="spiral"):
        usp.replace_attention(model, layout="spiral")


@pytest.mark.parametrize("batch_first", [False, True])
def test_encoder_on_one_device(plain_path, batch_first) -> None:
    theirs = make_encoder(batch_first)
    ours = usp.replace_attention(copy.deepcopy(theirs))
    x, cotangent = random(5, 7, WIDTH, seed=1), random(5, 7, WIDTH, seed=2)
    expected, found = results((theirs, theirs(x), cotangent)), results((ours, ours(x), cotangent))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9)
