"""usp.linear_attention beside flash-linear-attention's naive references, on one process and two."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pool as workers
import pytest
import real_libraries as real
import torch
import torch.distributed as dist
import torch.nn.functional as F
from doors import Doubled, errors
from pool import Pool
from torch import Tensor

import usp

pytestmark = pytest.mark.library
BATCH, TOKENS, HEADS, DIMS = 2, 139, 3, (5, 4)
# the same on every rank, so that gradients are parts of a sum
SHARED = ("head decay", "initial_state")


@dataclass(frozen=True)
class Naive:
    """A reference of theirs, which scales q by D ** -0.5 and computes in fp32.

    Attributes:
        folder: Of fla/ops, that of its file.
        decay: What has one of its own: "head", "token" or "channel".
        argument: How it names the decay.
        heads_first: Whether heads stand before tokens in what it takes and gives.
        heads: Of q and k, of HEADS of v.
        states: Whether it takes and returns one.
    """

    folder: str
    name: str
    decay: str | None = None
    argument: str = "g"
    delta: bool = False
    heads_first: bool = False
    heads: int = HEADS
    states: bool = True

    def inputs(self) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        (d, e), tokens = DIMS, (BATCH, TOKENS)
        found = {name: normal(*tokens, self.heads, d) for name in "qk"}
        found["v"] = normal(*tokens, HEADS, e)
        if self.decay is not None:
            of_token = (*tokens, HEADS) if self.decay == "token" else (*tokens, HEADS, d)
            shape = (HEADS,) if self.decay == "head" else of_token
            name = "head decay" if self.decay == "head" else "decay"
            found[name] = F.logsigmoid(normal(*shape))
        if self.delta:
            found["k"] = F.normalize(found["k"], dim=-1)
            found["beta"] = normal(*tokens, HEADS).sigmoid()
        if self.states:
            found["initial_state"] = normal(BATCH, HEADS, d, e)
        return found

    def __call__(self, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Their out, and the last state where it is given."""
        function = runpy.run_path(str(real.FOLDER / "fla" / "ops" / self.folder / "naive.py"))
        given = {name: y for name, y in x.items() if "decay" not in name}
        if self.states:
            given["output_final_state"] = True
        for name in x.keys() & {"decay", "head decay"}:
            of_head = name == "head decay"
            given[self.argument] = x[name].expand(BATCH, TOKENS, -1) if of_head else x[name]
        for name in ("q", "k", "v", "beta") if self.heads_first else ():
            if name in given:
                given[name] = given[name].transpose(1, 2)
        with Doubled():
            found = function[self.name](**given)
        out, *states = found if self.states else (found,)
        return out.transpose(1, 2) if self.heads_first else out, *states


REFERENCES = {
    "linear attention": Naive("linear_attn", "naive_recurrent_linear_attn"),
    "retention": Naive("retention", "naive_retention", heads_first=True, states=False),
    "lightning, simple GLA of a head": Naive("simple_gla", "naive_recurrent_simple_gla", "head"),
    "simple GLA": Naive("simple_gla", "naive_recurrent_simple_gla", "token"),
    "simple GLA in chunks": Naive("simple_gla", "naive_chunk_simple_gla", "token"),
    "GLA": Naive("gla", "naive_recurrent_gla", "channel", "gk"),
    "DeltaNet": Naive("delta_rule", "delta_rule_recurrence", delta=True, heads_first=True),
    "gated DeltaNet": Naive(
        "gated_delta_rule", "naive_recurrent_gated_delta_rule", "token", delta=True
    ),
    "KDA": Naive("kda", "naive_recurrent_kda", "channel", delta=True, heads=1),
}


def differentiated(
    found: tuple[Tensor, ...], wanted: list[Tensor], leaves: dict[str, Tensor]
) -> dict[str, Tensor]:
    cotangents = wanted[: len(found)]
    gradients = torch.autograd.grad(found, list(leaves.values()), cotangents)
    results = dict(zip(("out", "final"), (x.detach() for x in found), strict=False))
    return results | {f"d {name}": x for name, x in zip(leaves, gradients, strict=True)}


def ours(reference: Naive, mesh: usp.SequenceMesh | None, leaves: dict[str, Tensor]) -> Any:
    decay = leaves.get("decay", leaves.get("head decay"))
    if reference.name == "naive_retention":
        decay = torch.log1p(-(2.0 ** (-5 - torch.arange(HEADS, dtype=torch.float64))))
    return usp.linear_attention(
        *(leaves["q"] * DIMS[0] ** -0.5, leaves["k"], leaves["v"], decay),
        beta=leaves.get("beta"),
        mesh=mesh,
        initial_state=leaves.get("initial_state"),
        return_state=True,
    )


def differing(reference: Naive, ranks: int) -> dict[str, float]:
    """On a worker: what of this rank's results and gradients is not as theirs."""
    mesh = None if ranks == 1 else workers.mesh(1, ranks)
    whole, random = reference.inputs(), torch.Generator().manual_seed(4)
    shapes = (BATCH, TOKENS, HEADS, DIMS[1]), (BATCH, HEADS, *DIMS)
    wanted = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
    leaves = {name: x.requires_grad_() for name, x in whole.items()}
    theirs = differentiated(reference(leaves), wanted, leaves)

    def part(name: str, x: Tensor) -> Tensor:
        is_shared = mesh is None or name.removeprefix("d ") in (*SHARED, "final")
        return x if is_shared else usp.shard_sequence(x, mesh, 1)

    mine = {name: part(name, x.detach()).clone().requires_grad_() for name, x in whole.items()}
    found = ours(reference, mesh, mine)[: 2 if reference.states else 1]
    cotangents = [part("out", wanted[0]), wanted[1] / ranks]
    results = differentiated(found, cotangents, mine)
    for name in SHARED if ranks > 1 else ():
        if f"d {name}" in results:
            dist.all_reduce(results[f"d {name}"])
    return errors({name: part(name, x) for name, x in theirs.items()}, results)


def start_theirs() -> None:
    """In a fresh worker: their files import torch and einops, and all of fla is not needed."""
    sys.path.insert(0, str(real.FOLDER))


@pytest.fixture(scope="module")
def pool_of_theirs() -> Iterator[Pool]:
    real.folder()
    pool = Pool(size=2, setup=start_theirs)
    yield pool
    pool.close()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", REFERENCES)
def test_results_and_gradients_are_theirs(pool_of_theirs: Pool, name: str, ranks: int) -> None:
    for found in pool_of_theirs.run(differing, REFERENCES[name], ranks, ranks=ranks):
        assert found == {}
