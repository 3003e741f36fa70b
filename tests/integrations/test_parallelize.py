"""A model whose tokens usp.parallelize spreads is the model on one device."""

from __future__ import annotations

import copy
import pickle
from typing import Any
from unittest import mock

import compiling
import doors
import pool as workers
import pytest
import torch
import torch.nn.functional as F
from integration_models import F64, random
from pool import RemoteError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import usp
from usp.attention import functional

pytestmark = pytest.mark.library

MESHES = [(2, 1), (1, 2), (2, 2), (1, 3)]
WIDTH, TOKENS = 12, 13


class Attention(nn.Module):
    """As in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, mask)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop_prob)
        return x * keep / (1 - self.drop_prob)


class Block(nn.Module):
    """Attention of one kind or another, and an argument with an entry for each token."""

    def __init__(self, attention: nn.Module, drop: float = 0.0, again: str = "") -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), attention
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
        self.drop, self.drop_path, self.again = nn.Dropout(drop), DropPath(drop), again

    def forward(self, x: Tensor, scale: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        if isinstance(self.attn, nn.MultiheadAttention):
            hidden = None if mask is None else ~mask
            y = self.attn(y, y, y, attn_mask=hidden, need_weights=False)[0]
        elif self.again:
            y = checkpoint(self.attn, y, mask, use_reentrant=self.again == "reentrant")
        else:
            y = self.attn(y, mask)
        x = x + self.drop_path(self.drop(y))
        return x + self.mlp(x) * (1.0 if scale is None else scale)


class Model(nn.Module):
    """Patches, a class token, positions, blocks, a norm, two kinds of heads."""

    def __init__(
        self, kind: str = "function", drop: float = 0.0, again: str = "", depth: int = 2
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.positions = nn.Linear(5, WIDTH), nn.Parameter(torch.randn(40, WIDTH))
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList(Block(self.attention(kind), drop, again) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.again = "" if again in ("reentrant", "other") else again.removeprefix("blocks, ")
        if again.startswith("blocks"):
            for block in self.blocks:
                block.again = ""
        doors.randomize(self)

    @staticmethod
    def attention(kind: str) -> nn.Module:
        if kind == "function":
            return Attention()
        return nn.MultiheadAttention(WIDTH, 3, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        x = torch.cat((self.cls.expand(len(x), -1, -1), self.embed(x)), 1)
        x = x + self.positions[: x.shape[1]]
        scale = x.mean(-1, keepdim=True)
        for block in self.blocks:
            if self.again:
                x = checkpoint(block, x, scale, mask, use_reentrant=self.again == "reentrant")
            else:
                x = block(x, scale, mask=mask)
        x = self.norm(x)
        return {"class": self.head(x[:, 0]), "mean": (self.head(x.mean(1)), 3)}


BESIDE = usp.Boundary("blocks", beside={"scale": 1})


def tokens(length: int = TOKENS, seed: int = 1) -> Tensor:
    return random(2, length - 1, 5, seed=seed)


def mask() -> Tensor:
    return torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() | (random(TOKENS, 1, seed=4) > 0.5)


def _compared(
    mesh: tuple[int, int], layout: str, kind: str, masked: bool, **pieces: Any
) -> dict[str, float]:
    placed = workers.mesh(*mesh)
    inputs = {"x": tokens(), "mask": mask() if masked else None}
    return doors.compared(
        Model(kind),
        inputs,
        placed,
        lambda m: usp.parallelize(m, placed, BESIDE, layout=layout, **pieces),
    )


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["function", "module"])
@pytest.mark.parametrize("masked", [False, True])
def test_whole_in_and_whole_out(pool, mesh, kind, masked) -> None:
    layout = "zigzag" if kind == "function" else "contiguous"
    for wrong in pool.run(_compared, mesh, layout, kind, masked, ranks=mesh[0] * mesh[1]):
        assert wrong == {}


def _in_pieces(mesh: tuple[int, int], kind: str) -> dict[str, float]:
    calls: list[int] = []
    real = functional.chunked_attention

    def counted(tensors: Any, call: Any, on: Any) -> Any:
        calls.append(call.request.chunks)
        return real(tensors, call, on)

    with mock.patch.object(functional, "chunked_attention", counted):
        pieces = {"chunks": 3, "head_chunks": 2, "offload": "cpu"}
        wrong = _compared(mesh, "zigzag", kind, kind == "function", **pieces)
    assert calls == [3, 3]  # a block each
    return wrong


@pytest.mark.parametrize("mesh", [(2, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", ["function", "module"])
def test_attention_in_chunks(pool, mesh, kind) -> None:
    """On one device, too."""
    for wrong in pool.run(_in_pieces, mesh, kind, ranks=mesh[0] * mesh[1]):
        assert wrong == {}


# torch's own encoder -----------------------------------------------------------------------------


def _encoder(batch_first: bool, training: bool, causal: bool) -> dict[str, float]:
    mesh = workers.mesh(2, 2)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 16, 0.0, batch_first=batch_first)
    model = doors.randomize(nn.TransformerEncoder(layer, 2)).train(training)
    shape = (2, TOKENS, WIDTH) if batch_first else (TOKENS, 2, WIDTH)
    inputs: dict[str, Any] = {"src": random(*shape, seed=1)}
    padding = torch.zeros(2, TOKENS, dtype=F64)
    padding[1, 9:] = -torch.inf
    inputs["src_key_padding_mask"] = padding
    if causal:
        inputs["mask"] = nn.Transformer.generate_square_subsequent_mask(TOKENS, dtype=F64)
    torch.backends.mha.set_fastpath_enabled(False)
    wrong = doors.compared(model, inputs, mesh, lambda m: usp.parallelize(m, mesh))
    torch.backends.mha.set_fastpath_enabled(True)
    with torch.no_grad():  # the fused path, which never calls attention, and nests padded tensors
        ours = usp.parallelize(copy.deepcopy(model), mesh).eval()
        inputs["src_key_padding_mask"] = padding.isinf()
        out = ours(**inputs)
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        wanted = model(**inputs)
        torch.backends.mha.set_fastpath_enabled(True)
        wrong |= doors.errors({"evaluation": wanted}, {"evaluation": out})
        restored = usp.restore(ours)
        assert restored.use_nested_tensor == model.use_nested_tensor
        wrong |= doors.errors({"restored": model(**inputs)}, {"restored": restored(**inputs)})
    return wrong


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:Support for mismatched")
def test_torchs_encoder_is_known(pool, batch_first, training, causal) -> None:
    for wrong in pool.run(_encoder, batch_first, training, causal, ranks=4):
        assert wrong == {}


# Computed again ----------------------------------------------------------------------------------


def _checkpointed(again: str) -> dict[str, float]:
    mesh = workers.mesh(1, 2)

    def spread(model: nn.Module) -> None:
        usp.parallelize(model, mesh, BESIDE, layout="zigzag")

    return doors.compared(Model(again=again), {"x": tokens(), "mask": mask()}, mesh, spread)


@pytest.mark.parametrize("again", ["reentrant", "other", "blocks, reentrant", "blocks, other"])
def test_checkpoints_of_blocks_and_of_what_they_hold(pool, again) -> None:
    for wrong in pool.run(_checkpointed, again, ranks=2):
        assert wrong == {}


def _two_lengths(lengths: tuple[int, ...], again: str) -> dict[str, float]:
    """Forwards of several lengths before their backward, each computed again."""
    mesh = workers.mesh(1, 2)
    whole = Model(again=again)
    ours = usp.parallelize(copy.deepcopy(whole), mesh, BESIDE)
    gradients = []
    for model in (whole, ours):
        outs = [model(tokens(length))["class"] for length in lengths]
        sum((n + 1) * out.square().sum() for n, out in enumerate(outs)).backward()
        usp.all_reduce_gradients(model, None if model is whole else mesh)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    return doors.errors(*gradients)


@pytest.mark.parametrize("lengths", [(13, 8), (7, 8), (8, 7, 20)])
def test_what_is_computed_again_knows_its_length(pool, lengths) -> None:
    """A rank holds 4 tokens of 7 and of 8: there the ranks tell each other."""
    for wrong in pool.run(_two_lengths, lengths, "blocks, other", ranks=2):
        assert wrong == {}


def test_what_a_block_holds_knows_its_length_too(pool) -> None:
    for wrong in pool.run(_two_lengths, (7, 8), "other", ranks=2):
        assert wrong == {}


class HeadsFirst(Attention):
    """Its first argument has no tokens along dim 1."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return checkpoint(self.part, x.mT, mask, use_reentrant=False)

    def part(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.inner(x, mask)


class Inner(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x.mT.contiguous(), mask)


def _no_tokens() -> None:
    model = Model()
    for block in model.blocks:
        block.attn = HeadsFirst()
        block.attn.inner = Inner()
    usp.parallelize(doors.randomize(model), workers.mesh(1, 2), BESIDE)
    sum(model(tokens(length))["class"].sum() for length in (13, 8)).backward()


def test_a_length_that_cannot_be_told_is_refused(pool) -> None:
    message = r"again in the backward with 12 tokens along dim 1 .* of \[8, 13\] tokens.* \[4, 7\]"
    with pytest.raises(RemoteError, match=message):
        pool.run(_no_tokens, ranks=2)


def _averaged(wrapper: str) -> dict[str, float]:
    """DDP or FSDP2 over the sequence ranks: the loss times their number."""
    mesh, whole = workers.mesh(1, 2), Model()
    ours = usp.parallelize(copy.deepcopy(whole), mesh, BESIDE)
    if wrapper == "DDP":
        wrapped = nn.parallel.DistributedDataParallel(ours)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        for part in (*ours.blocks, ours):
            wrapped = fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    gradients = []
    for model, called, factor in ((whole, whole, 1), (ours, wrapped, mesh.size)):
        out = called(tokens())
        (factor * (out["class"].square().sum() + out["mean"][0].sin().sum())).backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        gradients.append({n: getattr(g, "full_tensor", lambda g=g: g)() for n, g in found.items()})
    return doors.errors(*gradients)


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_a_wrapper_that_averages_takes_the_loss_times_the_ranks(pool, wrapper) -> None:
    for wrong in pool.run(_averaged, wrapper, ranks=2):
        assert wrong == {}


# Copies, undoing, other models -------------------------------------------------------------------


def _copied() -> dict[str, float]:
    mesh, wrong = workers.mesh(1, 2), {}
    model = Model()
    wanted = model(tokens(20))["class"]
    ours = usp.parallelize(copy.deepcopy(model), mesh, BESIDE)
    ours(tokens())
    for name, twin in {
        "copy": copy.deepcopy(ours),
        "pickle": pickle.loads(pickle.dumps(ours)),
    }.items():
        assert twin.blocks[0].forward.module is twin.blocks[0]
        wrong |= doors.errors({name: wanted}, {name: twin(tokens(20))["class"]})
        usp.restore(twin)
        assert "forward" not in twin.blocks[0].__dict__ and "forward" not in twin.__dict__
        wrong |= doors.errors({name: wanted}, {name: twin(tokens(20))["class"]})
    # ordinary modules, where they are called by themselves
    x = random(2, 5, WIDTH, seed=3)
    for part in (lambda m: m.blocks[1](x), lambda m: m.blocks[0].attn(x)):
        wrong |= doors.errors({"by itself": part(model)}, {"by itself": part(ours)})
    with torch.no_grad():
        part = lambda m: m.blocks[1](m.blocks[0](x))  # noqa: E731
        wrong |= doors.errors({"by itself": part(model)}, {"by itself": part(ours)})
    assert list(ours.state_dict()) == list(model.state_dict())
    return wrong


def _for_a_while() -> dict[str, float]:
    mesh, model, whole = workers.mesh(1, 2), Model(), Model()
    wanted = doors.results(whole, {"x": tokens()})
    with usp.parallelized(model, mesh, BESIDE, layout="zigzag") as ours:
        assert ours is model and "forward" in model.__dict__
        found = doors.results(model, {"x": tokens()}, lambda m: usp.all_reduce_gradients(m, mesh))
    wrong = doors.errors(wanted, found)
    with pytest.raises(ZeroDivisionError), usp.parallelized(model, mesh, BESIDE):
        _ = 1 / 0
    assert not any("forward" in module.__dict__ for module in model.modules())
    return wrong | doors.errors(wanted, doors.results(model, {"x": tokens()}))


def test_for_as_long_as_a_with_lasts(pool) -> None:
    for wrong in pool.run(_for_a_while, ranks=2):
        assert wrong == {}


def test_copies_restores_and_leaves_alone(pool) -> None:
    for wrong in pool.run(_copied, ranks=2):
        assert wrong == {}


def _pickled() -> bytes:
    return pickle.dumps(usp.parallelize(Model(), workers.mesh(1, 2), BESIDE))


def test_in_another_process_a_pickle_says_what_to_do(pool) -> None:
    twin = pickle.loads(pool.run(_pickled, ranks=2)[0])
    with pytest.raises(RuntimeError, match=r"rank 0 of another process, .*usp\.restore\(model\)"):
        twin(tokens())
    found = usp.parallelize(usp.restore(twin), None, BESIDE)(tokens())["class"]
    assert doors.errors({"": Model()(tokens())["class"]}, {"": found}) == {}


def test_a_forward_of_its_own_comes_back() -> None:
    model = Model()
    own = model.blocks[0].attn.forward
    model.blocks[0].attn.forward = own
    usp.parallelize(model, None, BESIDE)
    assert model(tokens())["class"].shape == (2, 3)
    usp.restore(usp.restore(model))
    assert model.blocks[0].attn.__dict__["forward"] is own
    assert usp.restore(nn.Linear(2, 2)).in_features == 2


# Random numbers ----------------------------------------------------------------------------------


def _dropped(seeds: tuple[int, int]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Of three steps which samples were dropped, which tokens' features, and the next number."""
    mesh = workers.mesh(1, 2)
    model = usp.parallelize(Model(drop=0.4).train(), mesh, BESIDE)
    samples, features = [], []
    path, drop = model.blocks[1].drop_path, model.blocks[1].drop
    path.register_forward_hook(lambda _, args, out: samples.append(out.flatten(1).any(1)))
    drop.register_forward_hook(lambda _, args, out: features.append((out == 0)[:, :6]))
    torch.manual_seed(seeds[mesh.rank])
    for _ in range(3):
        model(random(16, TOKENS - 1, 5, seed=1))
    return samples, features, torch.randint(2**60, ())


@pytest.mark.parametrize("seeds", [(3, 3), (3, 4)])
def test_samples_are_dropped_alike_and_features_are_not(pool, seeds) -> None:
    (samples, features, after), theirs = pool.run(_dropped, seeds, ranks=2)
    assert all(torch.equal(a, b) for a, b in zip(samples, theirs[0], strict=True))
    assert 0 < torch.stack(samples).sum() < 48
    assert not any(torch.equal(a, b) for a, b in zip(features, theirs[1], strict=True))
    assert (after == theirs[2]) == (seeds[0] == seeds[1])  # uneven shards, and still in step


# Refusals ----------------------------------------------------------------------------------------


class ByHand(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = torch.exp(q @ k.mT)
        return self.proj(weights / weights.sum(-1, keepdim=True) @ v)


class Convolving(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)


class Own(nn.MultiheadAttention):
    pass


def _refused(case: str) -> None:
    mesh, model, trunk = workers.mesh(1, 2), Model(), BESIDE
    if case == "by hand":
        model.blocks[1].attn = doors.randomize(ByHand())
    elif case == "named":
        model.blocks[1].attn = doors.randomize(ByHand())
        trunk = usp.Boundary("blocks", "*.attn", beside={"scale": 1})
    elif case == "convolution":
        model.blocks[1].attn = Convolving()
    elif case == "own class":
        model.blocks[1].attn = Own(WIDTH, 3)
    elif case == "beside":
        trunk = usp.Boundary("blocks", beside={"scale": 2})
    elif case == "by itself":
        usp.parallelize(model, mesh, trunk).blocks[0](random(2, 5, WIDTH, seed=3))
    elif case == "looped":
        model.blocks = nn.ModuleList([model.blocks[0], model.blocks[1]])
        block, other = model.blocks
        model.forward = lambda x: other(block(block(model.embed(x))))
    elif case == "left early":
        model.blocks = nn.ModuleList([*model.blocks, nn.Sequential()])
        model.forward = lambda x: model.blocks[0](model.embed(x))
    usp.parallelize(model, mesh, trunk)
    if case == "twice":
        usp.parallelize(model, mesh, trunk)
    model(tokens())


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("by hand", "NotImplementedError", r"blocks\.1 \(Block\) called no attention .* of its 13"),
        ("named", "NotImplementedError", r"blocks\.1\.attn \(ByHand\) called no attention"),
        ("convolution", "NotImplementedError", r"blocks\.1\.attn\.conv \(Conv1d\): its kernel of"),
        ("own class", "NotImplementedError", r"cannot answer for blocks\.1\.attn: .*Own"),
        ("beside", "ValueError", r"scale is \(2, 13, 1\) with 1 entries along dim 2 for 13 tokens"),
        ("twice", "ValueError", r"usp\.restore\(model\) first"),
        ("by itself", "RuntimeError", "blocks is called outside of the model's forward"),
        ("looped", "RuntimeError", "first module of blocks is called again before the last"),
        ("left early", "RuntimeError", "the last module of blocks was not called"),
    ],
)
def test_what_cannot_be_right_is_named(pool, case, kind, message) -> None:
    for error in pool.outcomes(_refused, case, ranks=2):
        assert isinstance(error, RemoteError) and error.kind == kind, error
        with pytest.raises(RemoteError, match=message):
            raise error


def test_a_trunk_is_found_or_asked_for() -> None:
    model = Model()
    for trunk, message in (
        (None, r"the trunk of Model is not known"),
        ("layers", r"Model has no module 'layers'; .* it has blocks, blocks\.0\.mlp"),
        (usp.Boundary("blocks", "*.attention"), r"'\*\.attention' means no module of the trunk"),
        (["blocks", "layers"], "no module 'layers'"),
    ):
        with pytest.raises(ValueError, match=message):
            usp.parallelize(model, None, trunk)
        assert "forward" not in model.blocks[0].__dict__
    with pytest.raises(TypeError, match=r"trunk must be a name, a usp\.Boundary or several, got 3"):
        usp.parallelize(model, None, [3])
    with pytest.raises(ValueError, match="parallelize takes a rule"):
        usp.parallelize(model, None, "blocks", layout=usp.Held((3, 4)))


class Mixed(nn.Module):
    """Beside attention of all tokens one that is local on purpose, and its own statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.windows = Attention(), nn.ModuleDict({"attn": Attention()})
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        x = x + self.norm(x.transpose(1, 2)).transpose(1, 2)
        return x + self.windows["attn"](x.flatten(0, 1)[:, None])[:, 0].view_as(x)


def _local() -> dict[str, float]:
    mesh = workers.mesh(1, 2)
    model = doors.randomize(nn.Sequential(Mixed())).eval()
    trunk = usp.Boundary("", "0.attn", local=("0.windows", nn.BatchNorm1d))
    x = {"input": random(2, TOKENS, WIDTH, seed=1)}
    return doors.compared(model, x, mesh, lambda m: usp.parallelize(m, mesh, trunk))


def test_what_is_local_on_purpose_stays_so(pool) -> None:
    for wrong in pool.run(_local, ranks=2):
        assert wrong == {}


# Graphs ------------------------------------------------------------------------------------------


def _compiled(kind: str) -> dict[str, float]:
    mesh, whole, wrong = workers.mesh(1, 2), Model(kind), {}
    ours = usp.parallelize(copy.deepcopy(whole), mesh, BESIDE, layout="zigzag")
    with compiling.afresh():
        compiled = torch.compile(ours, backend="aot_eager")
        for length in (TOKENS, 8, TOKENS):
            inputs = {"x": tokens(length)}
            found = doors.results(compiled, inputs, lambda m: usp.all_reduce_gradients(m, mesh))
            found = {name.replace("_orig_mod.", ""): x for name, x in found.items()}
            wrong |= doors.errors(doors.results(whole, inputs), found)
        # lengths that have been there are known to a graph
        one_graph = torch.compile(ours, backend="aot_eager", fullgraph=True)
        wanted = {"one graph": whole(tokens())["class"]}
        wrong |= doors.errors(wanted, {"one graph": one_graph(tokens())["class"]})
    return wrong


@pytest.mark.parametrize("kind", ["function", "module"])
def test_a_compiled_model(pool, kind) -> None:
    for wrong in pool.run(_compiled, kind, ranks=2):
        assert wrong == {}
