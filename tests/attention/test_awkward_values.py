"""Values of which no merge of blocks, and no mesh, may make anything special."""

from __future__ import annotations

from dataclasses import replace

import pool as worker
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import Case, local, shards, whole
from judge import attend, join, judge, oracle, run
from torch import Tensor

from usp.backends import TABLE
from usp.planning.problem import Traits

ON_CPU = Traits("cpu", torch.float64, 4, 4, 0.5)
BACKENDS = [backend.NAME for backend in TABLE if not backend.reasons_against(ON_CPU)]
CASE = Case(seq_len=23, heads=4, kv_heads=2, batch=2)
PLACES = [(3, 1, "contiguous", "ring"), (2, 2, "zigzag", "allgather"), (4, 1, "striped", "ring")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("special", ["zero channel", "opposite blocks", "far apart"])
def test_against_the_oracle(pool, special: str, dtype: str, backend: str) -> None:
    case = replace(CASE, special=special, dtype=dtype, backend=backend)
    for ring, ulysses, layout, transport in PLACES:
        here = replace(case, ring=ring, ulysses=ulysses, layout=layout, transport=transport)
        judge(here, pool)
        if special == "zero channel":
            ours = join(here, pool.run(run, here, ranks=here.ranks))
            assert (ours["out"][..., 1] == 0).all()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "sdpa"])
def test_blocks_that_are_hidden_from_some_rows(pool, backend: str) -> None:
    """Whole blocks by padding; for some rows by causal, a window and -inf columns together."""
    case = replace(CASE, special="first half padded", padding=0.2, causal=True, window=(9, None))
    case = replace(case, bias="b", bias_hides=0.3, backend=backend, return_lse=True)
    for ring, ulysses, layout, transport in PLACES:
        judge(replace(case, ring=ring, ulysses=ulysses, layout=layout, transport=transport), pool)


def with_poison(case: Case, poison: float) -> dict[str, Tensor]:
    """Keys and values from 13 on, which no query sees."""
    t = local(case, dist.get_rank())
    unseen = [i for i, p in enumerate(shards(case, case.num_keys)[dist.get_rank()]) if p >= 13]
    t.k[:, unseen] = poison
    t.v[:, unseen] = poison
    return attend(case, t, worker.mesh(case.ulysses, case.ring))


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_nobody_sees_may_hold_anything(pool, backend: str) -> None:
    """Hidden by position. What a padding mask or a bias hides must be finite, as in torch."""
    case = replace(CASE, seq_len=11, key_len=23, window=(3, 2), backend=backend)
    for ring, ulysses, layout, transport in PLACES:
        here = replace(case, ring=ring, ulysses=ulysses, layout=layout, transport=transport)
        wanted = pool.run(with_poison, here, 0.0, ranks=here.ranks)
        for poison in (torch.nan, torch.inf):
            for got, clean in zip(
                pool.run(with_poison, here, poison, ranks=here.ranks), wanted, strict=True
            ):
                assert all(torch.equal(got[name], clean[name]) for name in clean)


def rms(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).square().mean().sqrt().item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_of_scores_costs_what_it_costs_torch(pool, backend: str) -> None:
    """Scores near 1e5 are themselves rounded by 4e-3 in fp32; a mesh adds nothing to that.

    An offset that comes with the bias costs nothing: see test_levels.
    """
    case = Case(seq_len=64, heads=2, kv_heads=2, head_dim=16, value_dim=16, dtype="float32")
    case = replace(case, special="offset", backend=backend)
    t, exact = whole(case), oracle(case)
    leaves = [x.transpose(1, 2).contiguous().requires_grad_() for x in (t.q, t.k, t.v)]
    theirs = F.scaled_dot_product_attention(*leaves)
    their_dv = torch.autograd.grad(theirs, leaves, t.dout.transpose(1, 2))[2]
    allowed = {
        "out": rms(theirs.transpose(1, 2), exact["out"]),
        "dv": rms(their_dv.transpose(1, 2), exact["dv"]),
    }
    for ulysses, ring in ((1, 1), (1, 2), (1, 4), (2, 2)):
        here = replace(case, ulysses=ulysses, ring=ring)
        ours = join(here, pool.run(run, here, ranks=here.ranks))
        for name, their in allowed.items():
            error = rms(ours[name], exact[name])
            assert error <= 1.25 * their, f"{name} on {ulysses} x {ring}: {error:.2e}, {their:.2e}"
