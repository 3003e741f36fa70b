"""Faults of kinds that people make, each named; and right models, at which nothing is said."""

from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pool as workers
import pytest
import torch
import verify_models as models
from torch import nn
from verify_models import Attention, Encoder, Net, Pool

import usp
from usp.verification.job import Job, random_module, run_sharded
from usp.verification.record import Record
from usp.verification.verdict import judged
from usp.verification.verify import _arguments, places_of, whole_of


@dataclass(frozen=True)
class Case:
    """What ``usp.verify`` is given, and for a fault what it must say."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any] = models.features
    options: tuple[tuple[str, Any], ...] = ()
    module: str = ""
    cause: str = ""
    kind: str = "output"
    mesh: tuple[int, int] = (1, 2)
    training: bool = True

    def job(self) -> Job:
        torch.manual_seed(0)
        model = self.make().train(self.training)
        job = Job(model, _arguments(self.inputs()), self.mesh, **dict(self.options))
        return job


def case(make: Callable[[], nn.Module], module: str = "", cause: str = "", **more: Any) -> Case:
    fields = {
        name: more.pop(name) for name in ("inputs", "kind", "mesh", "training") if name in more
    }
    more.setdefault("sharded", models.spread_over)
    options = tuple((name, value) for name, value in more.items() if value is not None)
    return Case(make, options=options, module=module, cause=cause, **fields)


def attention(*args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return functools.partial(Attention, *args, **kwargs)


def of_torch(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Net(middle=models.OfTorch(make()))


STATISTICS, POSITIONS = "^statistics over local tokens", "^positions that start at 0"
WIDTH = models.WIDTH
FAULTS = {
    "instance norm": case(
        of_torch(lambda: nn.InstanceNorm1d(WIDTH)), "blocks.1.middle.inner", STATISTICS
    ),
    "batch norm": case(
        of_torch(lambda: nn.BatchNorm1d(WIDTH)), "blocks.1.middle.inner", STATISTICS
    ),
    "group norm": case(
        of_torch(lambda: nn.GroupNorm(3, WIDTH)), "blocks.1.middle.inner", STATISTICS
    ),
    "own norm": case(
        lambda: Net(middle=models.Standardised("own norm")), "blocks.1.middle", STATISTICS
    ),
    "normalized": case(
        lambda: Net(middle=models.Whole("normalized")), "blocks.1.middle", STATISTICS
    ),
    "turned": case(
        lambda: Net(middle=models.Whole("turned")), "blocks.1.middle", "^tokens in another order"
    ),
    "table": case(lambda: Net(models.Table("table")), "places", POSITIONS),
    "embedding": case(lambda: Net(models.Numbers("embedding")), "places", POSITIONS),
    "sines": case(lambda: Net(models.Sines("sines")), "places", POSITIONS),
    "rope": case(lambda: Net(attention=attention("rope")), "blocks.0.attn", POSITIONS),
    "container": case(
        models.Stack, "", POSITIONS, inputs=models.wide,
        sharded=functools.partial(models.stacked, wrong="table"),
    ),
    "first": case(
        lambda: Net(pool=Pool("first", "first")), "pool", "^a token that one rank holds, such as"
    ),
    "cls on each": case(
        lambda: Net(cls=models.Classes(), pool=Pool("mean")),
        "cls",
        "each rank adds a token of its own, such as a CLS token",
        sharded=models.spread_each_with_cls,
    ),
    "mean": case(lambda: Net(pool=Pool("mean", "mean")), "pool", "^a mean over local tokens"),
    "max": case(lambda: Net(pool=Pool("max", "max")), "pool", "^a mean over local tokens"),
    "adaptive pool": case(
        lambda: Net(middle=None, pool=Flat()), "pool.inner", "^a mean over local tokens"
    ),
    "mean of means": case(
        lambda: models.LM("mean of means"), "", "^a mean over local tokens",
        inputs=lambda: models.labelled(9),
    ),
    "mean of squares": case(
        lambda: Net(), "", "^a mean over local tokens", loss=models.mean_of_tokens
    ),
    "drop path": case(
        lambda: Net(middle=models.Dropped("drop path")), "blocks.1.middle.drop_path",
        "^DropPath drops other samples",
    ),
    "scaled twice": case(
        lambda: Encoder(), "", "^a loss scaled twice", inputs=models.wide, kind="gradient",
        sharded=None, loss=models.squares_divided,
    ),
    "DDP without the factor": case(
        lambda: Encoder(),
        "",
        "^a loss scaled twice: every gradient, summed over the ranks, is 1/2 .* a wrapper",
        inputs=models.wide,
        kind="gradient",
        sharded=models.averaged,
        loss=models.squares,
    ),
    "nobody divides": case(
        lambda: Encoder(), "", "^a loss that all 2 ranks compute alike and nobody divides",
        inputs=models.wide, kind="gradient", sharded=models.joined, loss=models.squares,
    ),
    "seam": case(
        lambda: models.LM("seam"), "", "^22 labels .* one device has 26.*shifted at a seam",
        inputs=models.labelled,
    ),
    "sinks": case(
        lambda: Net(attention=attention("sinks", sinks=True)), "blocks.0.attn", "^dropped sinks"
    ),
    "window": case(
        lambda: Net(attention=attention("window", window=4)), "blocks.0.attn",
        "^an ignored window: queries below position 5 are right",
    ),
    "causal": case(
        lambda: Net(attention=attention("causal")), "blocks.0.attn", "^attention with other options"
    ),
    "local attention": case(
        lambda: Net(attention=attention("local attention")), "blocks.0.attn",
        "^attention among this rank's own tokens",
    ),
    "local by boundary": case(
        lambda: Encoder(),
        "encoder.layers.0.self_attn",
        "^attention among this rank's own tokens",
        inputs=models.wide,
        mesh=(2, 2),
        sharded=None,
        trunk=usp.Boundary(
            "encoder.layers", attention="*.1.self_attn", local="encoder.layers.0.self_attn"
        ),
    ),
    "edges": case(
        lambda: Net(middle=models.Mixed("edges")), "blocks.1.middle", "^tokens at the edges of"
    ),
    "convolution": case(
        of_torch(lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1)), "blocks.1.middle.inner",
        "^its kernel of .* reaches over the edge",
    ),
    "recurrence": case(
        lambda: Net(middle=models.Recurrent()), "blocks.1.middle.gru", "token to token"
    ),
    "running sum": case(lambda: Net(middle=models.Running()), "blocks.1.middle", "token to token"),
    "gather": case(
        lambda: Net(pool=models.Gather("gather")), "pool", "a collective that sends nothing back",
        kind="gradient",
    ),
}  # fmt: skip


class Flat(models.Part):
    """Pools by a module of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.AdaptiveAvgPool1d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.mT)[..., 0]


def right(make: Callable[[], nn.Module], **more: Any) -> Case:
    return case(make, **more)


RIGHT = {
    "tokens": right(lambda: Net(models.Table())),
    "tokens, 4 ranks": right(lambda: Net(models.Table()), mesh=(2, 2)),
    "flattened": right(lambda: Net(models.Table(), pool=models.Flattened())),
    "chunks": right(
        lambda: Net(models.Table()), sharded=models.spread_in_chunks, mesh=(2, 2)
    ),
    "one token": right(lambda: Encoder(), inputs=models.one_token, sharded=models.replaced),
    "container": right(models.Stack, inputs=models.wide, sharded=models.stacked),
    "embedding": right(lambda: Net(models.Numbers())),
    "sines": right(lambda: Net(models.Sines())),
    "rope": right(lambda: Net(attention=attention("right rope"))),
    "window": right(lambda: Net(attention=attention(window=4))),
    "sinks": right(lambda: Net(attention=attention(sinks=True)), mesh=(2, 1)),
    "window and sinks": right(lambda: Net(attention=attention(window=3, sinks=True))),
    "own norm": right(lambda: Net(middle=models.Standardised())),
    "edges": right(lambda: Net(middle=models.Mixed())),
    "mean": right(lambda: Net(pool=Pool("mean"))),
    "max": right(lambda: Net(pool=Pool("max"))),
    "first": right(lambda: Net(pool=Pool("first")), mesh=(2, 2)),
    "gather": right(lambda: Net(pool=models.Gather())),
    "cls": right(
        lambda: Net(cls=models.Classes(), pool=Pool("first"), cut_at="blocks"),
        sharded=models.spread_with_cls,
    ),
    "drop path": right(lambda: Net(middle=models.Dropped())),
    "language model": right(lambda: models.LM(), inputs=models.labelled),
    "few labels": right(lambda: models.LM(), inputs=lambda: models.labelled(3)),
    "loss by hand": right(lambda: models.LM("by hand"), inputs=models.labelled),
    "loss of tokens": right(lambda: Net(models.Table()), loss=models.squares_of_tokens),
    "encoder": right(lambda: Encoder(), inputs=models.wide, sharded=None),
    "encoder, zigzag": right(
        lambda: Encoder(), inputs=models.wide, sharded=None, layout="zigzag", mesh=(2, 2)
    ),
    "encoder, dropout": right(lambda: Encoder(drop=0.3), inputs=models.wide, sharded=None),
    "encoder, its loss": right(
        lambda: Encoder(), inputs=models.wide, sharded=None, loss=models.squares
    ),
    "encoder, evaluation": right(
        lambda: Encoder(), inputs=models.wide, sharded=None, training=False
    ),
    "encoder, norm behind": right(
        lambda: Encoder(models.OfTorch(nn.InstanceNorm1d(WIDTH))), inputs=models.wide, sharded=None
    ),
    "FSDP2": right(
        lambda: Encoder(),
        inputs=models.wide,
        sharded=models.cut_by_fsdp,
        loss=models.averaged_squares,
    ),
    "DDP": right(
        lambda: Encoder(),
        inputs=models.wide,
        sharded=models.averaged,
        loss=models.averaged_squares,
    ),
    "replaced": right(lambda: Encoder(), inputs=models.wide, sharded=models.replaced),
    "joined": right(
        lambda: Encoder(), inputs=models.wide, sharded=models.joined, loss=models.squares_divided
    ),
    "joined, drawn": right(lambda: Encoder(), inputs=models.wide, sharded=models.joined),
    "wrapped": right(lambda: Encoder(), inputs=models.wide, sharded=models.Wrapped),
}  # fmt: skip


def _on_rank(given: bytes, shapes: list[tuple[int, ...]]) -> Record:
    job = pickle.loads(given)
    return run_sharded(job, workers.mesh(*job.mesh_shape), shapes)


def verified(pool: Any, given: Case) -> usp.Verification:
    """As usp.verify, on workers that are there."""
    job, whole = whole_of(given.job())
    assert random_module(job, whole) is None
    shapes = [tuple(x.shape) for x in whole.outputs]
    ranks = job.mesh_shape[0] * job.mesh_shape[1]
    outcomes = pool.run(_on_rank, job.to_bytes(), shapes, ranks=ranks)
    return judged(job.model, whole, outcomes, places_of(job), job.run_dtype())


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(pool, name) -> None:
    wanted, found = FAULTS[name], verified(pool, FAULTS[name])
    assert not found
    assert (found.module, found.kind) == (wanted.module, wanted.kind), str(found)
    assert re.search(wanted.cause, found.cause), str(found)


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_said_of_what_is_right(pool, name) -> None:
    found = verified(pool, RIGHT[name])
    assert found, str(found)
    assert found.compared > 10
