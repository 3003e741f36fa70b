"""``MultiheadAttention`` on a mesh under ``torch.compile``."""

from __future__ import annotations

import compiling
import multihead_cases as multihead
import pool as worker
import pytest
import torch

import usp


def compiled(case: multihead.Case, place: multihead.Place) -> multihead.Results:
    with compiling.afresh():
        return multihead.on_worker(case, place, compiling.Counting())


CASES = {
    "plain": multihead.Case(need_weights=False),
    # float padding, weights and lengths to be inferred: three more things that are communicated
    "everything": multihead.Case(
        inputs="memory", key_len=11, padding="float", mask="float", add_bias_kv=True
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_as_torch(pool, name: str) -> None:
    case, place = CASES[name], multihead.Place(2, 2, infer=name == "everything")
    parts = pool.run(compiled, case, place, ranks=4, timeout=120)
    multihead.assert_same(multihead.join(case, place, parts), multihead.by_torch(case))


def graphs(validate: str, seq_len: int | None, uneven: bool) -> tuple[int, float]:
    mesh, compiler = worker.mesh(2, 2), compiling.Counting()
    module = usp.MultiheadAttention(
        12, 3, mesh=mesh, batch_first=True, validate=validate, seq_len=seq_len
    )
    x = usp.shard_sequence(torch.randn(2, 19 if uneven else 20, 12), mesh, 1)
    wanted = module(x, x, x, need_weights=False)[0]
    with compiling.afresh():
        fast = torch.compile(module, fullgraph=True, backend=compiler)
        found = fast(x, x, x, need_weights=False)[0]
    return compiler.graphs, (found - wanted).abs().max().item()


@pytest.mark.parametrize("validate", ["first", "always", "never"])
@pytest.mark.parametrize(("seq_len", "uneven"), [(None, False), (None, True), (19, True)])
def test_one_graph(pool, validate: str, seq_len: int | None, uneven: bool) -> None:
    """Attention asks for a length and compares in the graph."""
    expected = [(1, pytest.approx(0.0, abs=1e-6))] * 4
    assert pool.run(graphs, validate, seq_len, uneven, ranks=4, timeout=120) == expected
