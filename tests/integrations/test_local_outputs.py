"""Language models that are given this rank's tokens and keep their logits: the gradient of the
whole, by the one rule."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import doors
import pool as workers
import pytest
import torch
import torch.nn.functional as F
from pool import RemoteError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import usp

pytestmark = pytest.mark.library
MESHES = [(1, 2), (2, 1), (2, 2)]
LAYOUTS = ["contiguous", "zigzag"]
WIDTH, TOKENS, VOCABULARY = 12, 13, 17
DOCUMENTS = (0, 4, 6, 13)


class Attention(nn.Module):
    """Causal where no mask is given."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, y: Tensor) -> Tensor:
        q, k, v = self.qkv(y).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, again: str = "", kind: str = "function") -> None:
        super().__init__()
        self.norm, self.again = nn.LayerNorm(WIDTH), again
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
        module = nn.MultiheadAttention(WIDTH, 3, batch_first=True)
        self.attention = module if kind == "module" else Attention()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        if isinstance(self.attention, nn.MultiheadAttention):
            y = self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        elif self.again == "inside":
            y = checkpoint(self.attention, y, use_reentrant=False)
        else:
            y = self.attention(y)
        return x + y + self.mlp(x + y)


class Decoder(nn.Module):
    def __init__(self, again: str = "", kind: str = "function") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.table = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(40, WIDTH)
        self.blocks = nn.ModuleList(Block(again, kind) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.again = again
        doors.randomize(self, 0.3)

    def forward(self, ids: Tensor, position_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids) + self.table(position_ids)
        for block in self.blocks:
            if self.again in ("reentrant", "other"):
                x = checkpoint(block, x, mask, use_reentrant=self.again == "reentrant")
            else:
                x = block(x, mask)
        return self.head(self.norm(x))


def batch_of(valid: str = "all", length: int = TOKENS, seed: int = 1) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    if valid == "few":  # of most ranks none
        labels[:, : length - 2] = -100
    return {"ids": ids, "labels": labels}


def loss_of(model: nn.Module, batch: dict[str, Any], how: str, mesh: Any) -> Tensor:
    """As it was, with a count of all ranks; or usp's."""
    given = {"spread": batch["spread"]} if mesh is not None else {}
    logits = model(batch["ids"], batch["position_ids"], **given).flatten(0, 1)
    labels = batch["labels"].flatten()
    if how == "usp":
        return usp.cross_entropy(logits, labels, mesh)
    total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return total / batch["num_items_in_batch"]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    return {name: grad for name, grad in found.items() if grad is not None}


def whole_loss(model: nn.Module, batch: dict[str, Any], documents: Any) -> Tensor:
    """One device, document by document."""
    cut = usp.cut_batch(batch, None, cu_seqlens=documents)
    ends = documents or (0, batch["ids"].shape[1])
    pieces = [slice(a, b) for a, b in itertools.pairwise(ends)]
    logits = [model(cut["ids"][:, p], cut["position_ids"][:, p]) for p in pieces]
    labels = cut["labels"].flatten()
    return F.cross_entropy(torch.cat(logits, 1).flatten(0, 1), labels, ignore_index=-100)


def _compared(
    mesh: tuple[int, int], layout: Any, how: str, valid: str, documents: Any, again: str = ""
) -> dict[str, float]:
    placed, model, batch = workers.mesh(*mesh), Decoder(again), batch_of(valid)
    wanted = whole_loss(model, batch, documents)
    wanted.backward()
    ours = usp.parallelize(copy.deepcopy(model), placed, "blocks", outputs="local")
    ours.zero_grad()
    cut = usp.cut_batch(batch, placed, layout, cu_seqlens=documents)
    if how == "FSDP2":
        device_mesh = init_device_mesh("cpu", (placed.size,))
        for part in (*ours.blocks, ours):
            fully_shard(part, mesh=device_mesh)
        loss = loss_of(ours, cut, "torch", placed)
        (loss * placed.size).backward()
    elif how == "DDP":
        wrapped = DistributedDataParallel(ours)
        loss = loss_of(wrapped, cut, "torch", placed)
        (loss * placed.size).backward()
    else:
        loss = loss_of(ours, cut, how, placed)
        loss.backward()
        usp.all_reduce_gradients(ours, placed)
    value = loss.detach().clone()
    if how != "usp":
        torch.distributed.all_reduce(value)
    found = {"loss": value} | gradients(ours)
    found = {name: getattr(x, "full_tensor", lambda x=x: x)() for name, x in found.items()}
    return doors.errors({"loss": wanted.detach()} | gradients(model), found)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("how", "valid"), [("torch", "all"), ("usp", "few"), ("DDP", "few")])
def test_every_gradient_is_that_of_the_whole(pool, mesh, layout, how, valid) -> None:
    ranks = mesh[0] * mesh[1]
    for wrong in pool.run(_compared, mesh, layout, how, valid, None, ranks=ranks):
        assert wrong == {}


def test_fsdp_takes_the_loss_times_the_ranks_too(pool) -> None:
    for wrong in pool.run(_compared, (1, 2), "zigzag", "FSDP2", "few", None, ranks=2):
        assert wrong == {}


@pytest.mark.parametrize("layout", [*LAYOUTS, usp.DocumentZigzag(DOCUMENTS)], ids=str)
def test_packed_documents_are_apart(pool, layout) -> None:
    for wrong in pool.run(_compared, (2, 2), layout, "usp", "all", DOCUMENTS, ranks=4):
        assert wrong == {}


@pytest.mark.parametrize("again", ["reentrant", "other", "inside"])
def test_what_is_computed_again_is_of_its_batch(pool, again) -> None:
    args = ((1, 2), "zigzag", "usp", "all", DOCUMENTS, again)
    for wrong in pool.run(_compared, *args, ranks=2):
        assert wrong == {}


def _two_batches(again: str) -> dict[str, float]:
    """Two forwards of equal lengths, with other documents, before one backward."""
    mesh, model = workers.mesh(1, 2), Decoder(again)
    ours = usp.parallelize(copy.deepcopy(model), mesh, "blocks", outputs="local")
    several = [(batch_of(seed=1), (0, 4, 6, 13)), (batch_of(seed=2), (0, 9, 13))]
    sum(whole_loss(model, batch, documents) for batch, documents in several).backward()
    cut = [usp.cut_batch(b, mesh, "zigzag", cu_seqlens=d) for b, d in several]
    sum(loss_of(ours, batch, "usp", mesh) for batch in cut).backward()
    usp.all_reduce_gradients(ours, mesh)
    return doors.errors(gradients(model), gradients(ours))


@pytest.mark.parametrize("again", ["reentrant", "other"])
def test_batches_in_flight_keep_their_documents(pool, again) -> None:
    for wrong in pool.run(_two_batches, again, ranks=2):
        assert wrong == {}


def test_what_cannot_be_told_apart_is_refused(pool) -> None:
    with pytest.raises(RemoteError, match="checkpoint whole modules of the trunk"):
        pool.run(_moved, ranks=2)


def _moved() -> None:
    """What a checkpoint keeps is moved away, and comes back as another tensor."""
    mesh = workers.mesh(1, 2)
    ours = usp.parallelize(Decoder("other"), mesh, "blocks", outputs="local")
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        cut = [usp.cut_batch(batch_of(length=n), mesh) for n in (13, 12)]
        sum(loss_of(ours, batch, "usp", mesh) for batch in cut).backward()


def _compiled(blocks: bool) -> dict[str, float]:
    """Other lengths and documents come to what was compiled before."""
    mesh, model, wrong = workers.mesh(1, 2), Decoder(), {}
    ours = usp.parallelize(copy.deepcopy(model), mesh, "blocks", outputs="local")
    called = ours if blocks else torch.compile(ours, backend="aot_eager")
    for block in ours.blocks if blocks else ():
        block.compile(backend="aot_eager", fullgraph=True)
    for length, documents in ((13, None), (13, (0, 4, 13)), (13, (0, 6, 13)), (12, None)):
        model.zero_grad()
        ours.zero_grad()
        batch = batch_of(length=length)
        whole_loss(model, batch, documents).backward()
        cut = usp.cut_batch(batch, mesh, "zigzag", cu_seqlens=documents)
        loss_of(called, cut, "usp", mesh).backward()
        usp.all_reduce_gradients(ours, mesh)
        found = doors.errors(gradients(model), gradients(ours))
        wrong |= {f"{length}, {documents}: {name}": error for name, error in found.items()}
    return wrong


@pytest.mark.parametrize("blocks", [True, False])
def test_compiled_blocks_and_compiled_models(pool, blocks) -> None:
    for wrong in pool.run(_compiled, blocks, ranks=2):
        assert wrong == {}


def _multihead(documents: Any) -> dict[str, float]:
    """nn.MultiheadAttention with a mask of all keys."""
    mesh, model, batch = workers.mesh(2, 2), Decoder(kind="module"), batch_of()
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    apart = hidden.clone()
    ends = documents or (0, TOKENS)
    of = torch.bucketize(torch.arange(TOKENS), torch.tensor(ends[1:-1]), right=True)
    apart |= of[:, None] != of
    cut = usp.cut_batch(batch, None, cu_seqlens=documents)
    logits = model(cut["ids"], cut["position_ids"], mask=apart).flatten(0, 1)
    F.cross_entropy(logits, cut["labels"].flatten()).backward()
    ours = usp.parallelize(copy.deepcopy(model), mesh, "blocks", outputs="local")
    ours.zero_grad()
    cut = usp.cut_batch(batch, mesh, "striped", cu_seqlens=documents)
    logits = ours(cut["ids"], cut["position_ids"], mask=hidden, spread=cut["spread"])
    usp.cross_entropy(logits.flatten(0, 1), cut["labels"].flatten(), mesh).backward()
    usp.all_reduce_gradients(ours, mesh)
    return doors.errors(gradients(model), gradients(ours))


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=str)
def test_torchs_attention_with_a_mask_of_all_keys(pool, documents) -> None:
    for wrong in pool.run(_multihead, documents, ranks=4):
        assert wrong == {}


def _one_device() -> dict[str, float]:
    """mesh=None: the same program, whole."""
    model, batch = Decoder(), batch_of()
    ours = usp.parallelize(copy.deepcopy(model), None, "blocks", outputs="local")
    whole_loss(model, batch, DOCUMENTS).backward()
    cut = usp.cut_batch(batch, None, cu_seqlens=DOCUMENTS)
    logits = ours(cut["ids"], cut["position_ids"], spread=cut["spread"])
    usp.cross_entropy(logits.flatten(0, 1), cut["labels"].flatten(), None).backward()
    wrong = doors.errors(gradients(model), gradients(ours))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    again = twin(cut["ids"], cut["position_ids"], spread=cut["spread"])
    wrong |= doors.errors({"copy": logits.detach()}, {"copy": again.detach()})
    ids, places = batch["ids"], torch.arange(TOKENS)[None]
    plain = usp.restore(twin)(ids, places).detach()
    whole = ours(ids, places).detach()  # nobody says a Spread: as it was
    return (
        wrong
        | doors.errors({"plain": model(ids, places).detach()}, {"plain": plain})
        | (doors.errors({"whole": plain}, {"whole": whole}))
    )


def test_one_device_runs_the_same_program() -> None:
    assert _one_device() == {}


class Numbered(Decoder):
    """Makes its positions itself, from what it is given."""

    def forward(self, ids: Tensor, spread: Any = None) -> Tensor:
        own = torch.arange(ids.shape[1]) if spread is None else spread.positions()
        return super().forward(ids, own.expand_as(ids))


class Counting(Decoder):
    def forward(self, ids: Tensor, position_ids: Any = None) -> Tensor:
        return super().forward(ids, torch.arange(ids.shape[1]).expand_as(ids))


def _handed_on() -> dict[str, float]:
    mesh, model = workers.mesh(1, 2), Numbered()
    ours = usp.parallelize(copy.deepcopy(model), mesh, "blocks", outputs="local")
    cut = usp.cut_batch(batch_of(), mesh, "zigzag")
    out = cut["spread"].unshard(ours(cut["ids"], spread=cut["spread"]))
    return doors.errors({"": model(batch_of()["ids"])}, {"": out})


def test_a_model_that_asks_for_the_spread_gets_it(pool) -> None:
    for wrong in pool.run(_handed_on, ranks=2):
        assert wrong == {}


def _refused(what: str) -> None:
    mesh = workers.mesh(1, 2)
    model = Counting() if what == "positions" else Decoder()
    if what == "norm":
        model.final = nn.BatchNorm1d(VOCABULARY)
    layout = "zigzag" if what == "layout" else "contiguous"
    outputs = "own" if what == "outputs" else "local"
    usp.parallelize(model, mesh, "blocks", outputs=outputs, layout=layout)
    cut = usp.cut_batch(batch_of(), mesh)
    spread = None if what == "nobody" else cut["spread"]
    ids = batch_of()["ids"] if what == "whole" else cut["ids"]
    if what == "mesh":
        spread = usp.Spread(None, seq_len=TOKENS)
    if what == "kind":
        spread = 13
    if what == "outside":
        model.blocks[0](torch.randn(2, 7, WIDTH, dtype=torch.float64))
    places = torch.zeros_like(ids)
    model(ids, places, spread=spread)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("positions", "positions of the 7 tokens of this rank, of 13|positions of the 6 tokens"),
        ("norm", r"final \(BatchNorm1d\): its statistics"),
        ("layout", "each batch says its own"),
        ("outputs", 'must be "joined" or "local", got \'own\''),
        ("nobody", r"hand it all of usp.cut_batch\(batch, mesh\)"),
        ("whole", "13 tokens along dim 1, where this rank holds"),
        ("mesh", r"degrees \(2, 1\), at .* and spread= on one of \(1, 1\)"),
        ("kind", "spread must be a usp.Spread, got int"),
        ("outside", "outside of the model's forward"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(pool, what, message) -> None:
    with pytest.raises(RemoteError, match=message):
        pool.run(_refused, what, ranks=2)
