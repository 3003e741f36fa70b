"""``MultiheadAttention`` on a mesh under ``torch.compile``."""

from __future__ import annotations

import compiling
import multihead_cases as multihead
import pool as worker
import pytest
import torch

import usp
from usp import masks

pytestmark = pytest.mark.long


def compiled(
    case: multihead.Case, place: multihead.Place, backend: str | None
) -> tuple[multihead.Results, int]:
    compiler = compiling.Counting(backend)
    with compiling.afresh():
        results = multihead.on_worker(case, place, compiler)
    return results, compiler.graphs


CASES = {
    "plain": (multihead.Case(need_weights=False), False),
    # the attention itself asks for the lengths
    "lengths to be asked for": (
        multihead.Case(need_weights=False, causal=True, padding="bool", mask="bool"),
        True,
    ),
    # float padding, weights and extra keys: what more is communicated
    "everything": (
        multihead.Case(
            inputs="memory", key_len=11, padding="float", mask="float", add_bias_kv=True
        ),
        False,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_graph(pool, name: str) -> None:
    (case, infer), backend = CASES[name], None if name == "plain" else "aot_eager"
    place = multihead.Place(2, 2, infer=infer)
    parts = pool.run(compiled, case, place, backend, ranks=4)
    results = multihead.join(case, place, [results for results, _ in parts])
    multihead.assert_same(results, multihead.by_torch(case))
    assert [graphs for _, graphs in parts] == [1] * 4


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


@pytest.mark.parametrize(
    ("validate", "seq_len", "uneven"),
    [
        *((validate, None, True) for validate in ("first", "always", "never")),
        ("first", None, False),
        ("first", 19, True),
    ],
)
def test_one_graph_whenever_ranks_compare(
    pool, validate: str, seq_len: int | None, uneven: bool
) -> None:
    """Attention asks for a length and compares in the graph."""
    expected = [(1, pytest.approx(0.0, abs=1e-6))] * 4
    assert pool.run(graphs, validate, seq_len, uneven, ranks=4) == expected


def test_weights_of_lengths_to_be_asked_for(pool) -> None:
    """Then a graph ends where the ranks are asked."""
    case, place = multihead.Case(padding="float"), multihead.Place(2, 2, infer=True)
    parts = pool.run(compiled, case, place, None, ranks=4)
    results = multihead.join(case, place, [results for results, _ in parts])
    multihead.assert_same(results, multihead.by_torch(case))
    assert min(graphs for _, graphs in parts) > 1


def dropped() -> list[float]:
    """Differences to eager where weights and extra keys drop by the seed of the first rank."""
    mesh = worker.mesh(2, 2)
    torch.manual_seed(0)
    module = usp.MultiheadAttention(
        12, 3, 0.4, mesh=mesh, batch_first=True, seq_len=11, add_zero_attn=True, causal=True
    ).double()
    x = torch.randn(2, 2 + (mesh.rank < 3), 12, dtype=torch.float64)
    results = []
    with compiling.afresh():
        fast = torch.compile(module, fullgraph=True, backend="aot_eager")
        for function in (module, fast):
            torch.manual_seed(mesh.rank)
            out, weights = function(x, x, x)
            results.append((out, weights, *torch.autograd.grad(out.sum(), module.parameters())))
    return [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]


def test_dropout_of_weights_and_extra_keys(pool) -> None:
    assert max(max(found) for found in pool.run(dropped, ranks=4)) < 1e-12


def uncut() -> str:
    module = usp.MultiheadAttention(12, 3, mesh=worker.mesh(2, 2), causal=True)
    x = torch.randn(5, 2, 12, generator=torch.Generator().manual_seed(0))
    with compiling.afresh():
        try:
            torch.compile(module, fullgraph=True, backend="aot_eager")(x, x, x, need_weights=False)
        except ValueError as error:
            return str(error)
    return "nothing said"


def test_a_sequence_that_nobody_cut(pool) -> None:
    for said in pool.run(uncut, ranks=4):
        assert "all 4 ranks of the mesh hold the same 5 tokens" in said


def masked() -> tuple[list[bool], int]:
    """Whether results, weights and gradients are those of eager, by composed masks."""
    mesh, compiler = worker.mesh(2, 2), compiling.Counting("aot_eager")
    torch.manual_seed(0)
    table = masks.from_dense(masks.window(1, 4).dense(11, 11))
    module = usp.MultiheadAttention(
        12, 3, mesh=mesh, batch_first=True, seq_len=11, causal=True, mask=table | ~masks.causal(-3)
    ).double()
    x = torch.randn(2, 2 + (mesh.rank < 3), 12, dtype=torch.float64)
    results = []
    with compiling.afresh():
        fast = torch.compile(module, fullgraph=True, backend=compiler)
        for function in (module, fast):
            out, weights = function(x, x, x)
            gradients = torch.autograd.grad(torch.cos(out).sum(), module.parameters())
            results.append((out, weights, *gradients))
    return [torch.equal(a, b) for a, b in zip(*results, strict=True)], compiler.graphs


def test_weights_by_a_mask(pool) -> None:
    for same, graphs in pool.run(masked, ranks=4):
        assert all(same)
        assert graphs == 1
