"""Linear attention on any mesh equals the recurrence, token by token in fp64; every gradient."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any
from unittest import mock

import pool as worker
import pytest
import torch
import torch.distributed as dist
from cases import chunks
from hypothesis import given, settings
from hypothesis import strategies as st
from pool import RemoteError
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.flop_counter import FlopCounterMode

import usp
from usp.linear_attention import families, slabs
from usp.linear_attention.both_ways import shared_documents
from usp.planning.states import numbers_sent, numbers_summed
from usp.testing import StorageBytes, WireBytes, linear_recurrence

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}
SHARED = ("decay of a head", "state")  # the same on every rank, so gradients are parts of a sum


@dataclass(frozen=True)
class Case:
    """A sequence on a mesh.

    Attributes:
        heads: Of q, k and v.
        decay: What has one of its own: "heads", "tokens" or "channels"; None for none.
        strength: Factor of the logs, which lie between 0 and 1 of it.
        delta: Whether it is the delta rule: keys of length 1, and betas between 0 and 2.
        counts: Tokens of each rank, which hold them as they are; None for equal parts.
        states: Whether a state comes in, and the last one is asked for.
        plain: Ranks on which plain PyTorch computes, whoever else could.
    """

    ulysses: int = 1
    ring: int = 1
    batch: int = 1
    length: int = 7
    heads: tuple[int, int, int] = (2, 2, 2)
    dims: tuple[int, int] = (3, 2)
    decay: str | None = None
    strength: float = 1.0
    delta: bool = False
    method: str = "gather"
    causal: bool = True
    documents: tuple[int, ...] | None = None
    counts: tuple[int, ...] | None = None
    states: bool = False
    dtype: torch.dtype = torch.float64
    seed: int = 0
    plain: tuple[int, ...] = ()

    @property
    def ranks(self) -> int:
        return self.ulysses * self.ring

    @property
    def shares(self) -> list[int]:
        if self.counts is not None:
            return list(self.counts)
        rows = (len(row) for row in chunks(self.length, self.ring))
        return [len(piece) for row in rows for piece in chunks(row, self.ulysses)]

    @property
    def options(self) -> dict[str, Any]:
        given = {"method": self.method, "causal": self.causal, "cu_seqlens": self.documents}
        layout = "contiguous" if self.counts is None else usp.Held(self.counts)
        return given | {"layout": layout, "return_state": self.states}

    def whole(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Inputs by name, and cotangents of out and the last state."""
        random = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64).to(self.dtype)

        b, n, (d, e), h = self.batch, self.length, self.dims, max(self.heads)
        found = {
            name: normal(b, n, heads, dim)
            for name, heads, dim in zip("qkv", self.heads, (d, d, e), strict=True)
        }
        if self.decay is not None:
            shape = {"heads": (h,), "tokens": (b, n, h), "channels": (b, n, h, d)}[self.decay]
            logs = -torch.rand(shape, generator=random, dtype=torch.float64)
            if self.strength == float("inf"):  # some forget everything
                logs = logs.where(logs > -0.7, -torch.inf)
            else:
                logs *= self.strength
            found["decay of a head" if self.decay == "heads" else "decay"] = logs.to(self.dtype)
        if self.delta:
            found["k"] = torch.nn.functional.normalize(found["k"], dim=-1)
            betas = 2 * torch.rand((b, n, h), generator=random, dtype=torch.float64)
            found["beta"] = betas.to(self.dtype)
        if self.states:
            found["state"] = normal(b, h, d, e)
        return found, [normal(b, n, h, e), normal(b, h, d, e)]

    def part(self, name: str, x: Tensor, rank: int) -> Tensor:
        if name in SHARED:
            return x
        start, stop = list(pairwise(accumulate(self.shares, initial=0)))[rank]
        return x[:, start:stop]


def attend(case: Case, tensors: dict[str, Tensor], **more: Any) -> tuple[Tensor, ...]:
    decay = tensors.get("decay", tensors.get("decay of a head"))
    q, k, v = (tensors[name] for name in "qkv")
    states = {"initial_state": tensors.get("state"), "beta": tensors.get("beta")}
    options = case.options | states | more
    found = usp.linear_attention(q, k, v, decay, **options)
    return found if isinstance(found, tuple) else (found,)


def run(case: Case) -> dict[str, Tensor]:
    """On a worker: this rank's results and gradients."""
    return run_on(worker.mesh(case.ulysses, case.ring), case)


def run_on(mesh: usp.SequenceMesh | None, case: Case) -> dict[str, Tensor]:
    rank = 0 if mesh is None else mesh.rank
    tensors, (dout, dstate) = case.whole()
    leaves = {
        name: case.part(name, x, rank).clone().requires_grad_() for name, x in tensors.items()
    }
    with in_plain_torch() if rank in case.plain else nullcontext():
        found = attend(case, leaves, mesh=mesh, seq_len=case.length if case.seed % 2 else None)
    # each rank's copy of the state has its part of the gradient
    cotangents = [case.part("out", dout, rank), dstate / case.ranks][: len(found)]
    wanted = [x.to(y.dtype) for x, y in zip(cotangents, found, strict=True)]
    gradients = torch.autograd.grad(found, list(leaves.values()), wanted)
    results = dict(zip(("out", "final"), (x.detach() for x in found), strict=False))
    return results | {f"d {name}": x for name, x in zip(leaves, gradients, strict=True)}


def in_plain_torch() -> Any:
    return mock.patch.object(families, "FAMILIES", ())


def oracle(case: Case) -> dict[str, Tensor]:
    tensors, cotangents = case.whole()
    leaves = {name: x.double().requires_grad_() for name, x in tensors.items()}
    q, k, v = (leaves[name] for name in "qkv")
    found = linear_recurrence(
        *(q, k, v, leaves.get("decay", leaves.get("decay of a head"))),
        beta=leaves.get("beta"),
        causal=case.causal,
        cu_seqlens=case.documents,
        initial_state=leaves.get("state"),
    )[: 2 if case.states else 1]
    wanted = [x.double() for x in cotangents[: len(found)]]
    gradients = torch.autograd.grad(
        found, list(leaves.values()), wanted, allow_unused=True, materialize_grads=True
    )
    results = dict(zip(("out", "final"), (x.detach() for x in found), strict=False))
    return results | {f"d {name}": x for name, x in zip(leaves, gradients, strict=True)}


def judge(case: Case, parts: list[dict[str, Tensor]]) -> None:
    for name, expected in oracle(case).items():
        pieces = [part[name] for part in parts]
        wide = case.dtype if name != "final" else torch.promote_types(case.dtype, torch.float32)
        assert {x.dtype for x in pieces} == {wide}, name
        if name == "final":
            assert all(torch.equal(x, pieces[0]) for x in pieces), "the ranks' states differ"
            found = pieces[0]
        elif name.removeprefix("d ") in SHARED:
            found = torch.stack([x.double() for x in pieces]).sum(0)
        else:
            found = torch.cat(pieces, 1)
        assert found.shape == expected.shape, name
        if found.numel():
            scale = max(1.0, expected.abs().max().item())
            error = (found.double() - expected).abs().max().item() / scale
            assert error <= TOLERANCE[case.dtype], f"{name}: {error:.1e} of {scale:.2g}: {case}"


@st.composite
def cases(draw: st.DrawFn, meshes: list[tuple[int, int]], longest: int) -> Case:
    ulysses, ring = draw(st.sampled_from(meshes))
    length = draw(st.integers(1, longest))
    heads = draw(st.sampled_from([(1, 1, 1), (2, 2, 2), (1, 1, 3), (4, 2, 4), (2, 1, 1)]))
    causal = draw(st.integers(0, 3)) > 0
    documents = counts = None
    if draw(st.booleans()):
        cuts = sorted(draw(st.lists(st.integers(0, length), max_size=5)))
        documents = (0, *cuts, length)
    if draw(st.integers(0, 2)) == 0:
        cut = sorted(draw(st.lists(st.integers(0, length), min_size=3, max_size=3)))
        edges = [0, *cut[: ulysses * ring - 1], length]
        counts = tuple(b - a for a, b in pairwise(edges))
    return Case(
        ulysses,
        ring,
        batch=draw(st.integers(1, 2)),
        length=length,
        heads=heads,
        dims=(draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        decay=draw(st.sampled_from([None, "heads", "tokens", "channels"])) if causal else None,
        # of 1000 whatever was before is lost, and differences of sums would be, too
        strength=draw(st.sampled_from([0.1, 3.0, 1000.0, float("inf")])),
        delta=causal and draw(st.booleans()),
        method=draw(st.sampled_from(["gather", "ring"])),
        causal=causal,
        documents=documents,
        counts=counts,
        states=causal and draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
        plain=draw(st.sampled_from([(), (0,), (0, 1, 2, 3)])),
    )


@settings(max_examples=max(settings.default.max_examples // 6, 1))
@given(cases([(2, 1), (1, 2)], 21))
def test_two_ranks(pool, case: Case) -> None:
    judge(case, pool.run(run, case, ranks=2))


@pytest.mark.long
@settings(max_examples=max(settings.default.max_examples // 2, 1))
@given(cases([(2, 2), (4, 1), (1, 4)], 70))
def test_four_ranks(pool, case: Case) -> None:
    judge(case, pool.run(run, case, ranks=4))


CHUNKS = [
    Case(length=131, decay=None, states=True, dtype=torch.bfloat16),
    Case(length=197, decay="heads", heads=(2, 1, 2), documents=(0, 1, 64, 64, 150, 197)),
    Case(length=139, decay="tokens", heads=(1, 1, 2), strength=500.0, dtype=torch.float32),
    Case(length=131, decay="channels", strength=500.0, states=True, dtype=torch.float32),
    Case(length=64, decay="channels", documents=(0, 33, 64), batch=2),
    Case(length=65, causal=False, documents=(0, 30, 30, 65)),
    Case(length=199, delta=True, states=True, dims=(16, 5), documents=(0, 31, 128, 199)),
    Case(length=137, delta=True, decay="tokens", heads=(1, 1, 2), dims=(8, 8), dtype=torch.float32),
    Case(length=131, delta=True, decay="channels", strength=500.0, states=True),
]


@pytest.mark.parametrize("plain", [(), (0,)], ids=["kernels", "plain"])
@pytest.mark.parametrize("case", CHUNKS, ids=repr)
def test_many_chunks_on_one_device(case: Case, plain: tuple[int, ...]) -> None:
    judge(case, [run_on(None, replace(case, plain=plain))])


def methods(case: Case) -> list[Tensor]:
    """Both methods' results, one behind the other."""
    with in_plain_torch() if case.plain else nullcontext():
        return of_methods(case)


def of_methods(case: Case) -> list[Tensor]:
    mesh = worker.mesh(case.ulysses, case.ring)
    tensors, (dout, dstate) = case.whole()
    found = []
    for method in ("gather", "ring"):
        leaves = {
            n: case.part(n, x, mesh.rank).clone().requires_grad_() for n, x in tensors.items()
        }
        out, final = attend(case, leaves, mesh=mesh, method=method)
        wanted = [case.part("out", dout, mesh.rank).to(out.dtype), dstate.to(final.dtype)]
        found += [out.detach(), final.detach()]
        found += torch.autograd.grad([out, final], list(leaves.values()), wanted)
    return found


@pytest.mark.parametrize(("delta", "plain"), [(False, ()), (False, (0, 1, 2, 3)), (True, ())])
@pytest.mark.parametrize(
    "ranks", [2, pytest.param(4, marks=pytest.mark.long)], ids="{} ranks".format
)
def test_both_methods_give_the_same_bits(
    pool, ranks: int, delta: bool, plain: tuple[int, ...]
) -> None:
    options = {"decay": "tokens", "length": 13, "states": True, "dtype": torch.float32}
    case = Case(ranks // 2, 2, dims=(11, 5), delta=delta, plain=plain, **options)
    for found in pool.run(methods, case, ranks=ranks):
        half = len(found) // 2
        for a, b in zip(found[:half], found[half:], strict=True):
            assert torch.equal(a, b)


def among_some(order: list[int], method: str) -> tuple[int, dict[str, Tensor]] | None:
    """On a mesh of some ranks of the world, which stand in another order than in it."""
    table = torch.tensor(order).view(2, 2)
    groups = [(line, dist.new_group(line)) for line in [*table.T.tolist(), *table.tolist()]]
    if dist.get_rank() not in order:
        return None
    mine = [group for line, group in groups if dist.get_rank() in line]
    names = ("ring", "ulysses")
    on = DeviceMesh.from_group(mine, "cpu", mesh=table, mesh_dim_names=names)
    mesh = usp.SequenceMesh.from_device_mesh(on)
    return mesh.rank, run_on(mesh, replace(SOME, method=method))


SOME = Case(2, 2, length=11, decay="channels", states=True)


@pytest.mark.long
@pytest.mark.parametrize("order", [[0, 1, 2, 4], [0, 2, 1, 4]], ids=str)
def test_some_ranks_of_the_world(pool, order: list[int]) -> None:
    for method in ("gather", "ring"):
        parts = filter(None, pool.run(among_some, order, method, ranks=5))
        judge(SOME, [found for _, found in sorted(parts, key=lambda part: part[0])])


def sent(case: Case) -> tuple[int, int, list[str]]:
    """Bytes of a forward and of its backward, and the collectives of the forward."""
    mesh = worker.mesh(case.ulysses, case.ring)
    mesh.whole()
    tensors, _ = case.whole()
    leaves = {n: case.part(n, x, mesh.rank).clone().requires_grad_() for n, x in tensors.items()}
    with WireBytes() as forward:
        found = attend(case, leaves, mesh=mesh, seq_len=case.length, validate=False)
    with WireBytes() as backward:
        torch.autograd.grad(found, list(leaves.values()), [torch.ones_like(x) for x in found])
    return forward.sent, backward.sent, list(forward.calls.elements())


WIRE = [
    Case(2, 1, length=5, decay="tokens", batch=2, dtype=torch.bfloat16),
    Case(1, 2, length=211, decay="tokens", batch=2, dtype=torch.bfloat16),
    Case(1, 2, length=9, method="ring", decay="channels", states=True),
    Case(1, 2, length=9, causal=False, documents=(0, 2, 6, 8, 9), dtype=torch.float32),
    Case(1, 2, length=211, delta=True, decay="tokens", batch=2, dtype=torch.bfloat16),
    Case(2, 1, length=8, delta=True, method="ring", states=True),
]
WIRE += [
    pytest.param(Case(2, 2, length=n, decay=decay, method=method, states=n > 20), marks=[long])
    for long in (pytest.mark.long,)
    for n in (13, 131)
    for method in ("gather", "ring")
    for decay in (None, "heads", "channels")
]


@pytest.mark.parametrize("case", WIRE, ids=repr)
def test_bytes_are_those_of_the_formula_at_any_length(pool, case: Case) -> None:
    size = 8 if case.dtype == torch.float64 else 4
    (d, e), h = case.dims, max(case.heads)
    state = case.batch * h * d * e
    per = {None: 1, "heads": h, "tokens": case.batch * h, "channels": case.batch * h * d}
    for rank, found in enumerate(pool.run(sent, case, ranks=case.ranks)):
        if case.causal:
            chain = case.ranks, rank, case.method, case.states
            told = case.batch * h * d * d if case.delta else per[case.decay]
            expected = numbers_sent(state, told, *chain)
        else:
            expected = numbers_summed(state, case.ranks)
        assert found[:2] == tuple(size * n for n in expected)
        if case.method == "gather":
            assert len(found[2]) == 1, found[2]


def test_a_state_of_64_by_128_by_hand() -> None:
    """B 1, H 16: 16 x 64 x 128 numbers; to 7 others, with a decay of each head."""
    assert numbers_sent(131072, 16, 8, 3, "gather") == (7 * 131088, 7 * 131072)
    assert numbers_sent(131072, 16, 8, 3, "ring") == (131072, 131072)
    assert [numbers_sent(131072, 16, 8, rank, "ring") for rank in (0, 7)] == [
        (131072, 0),
        (0, 131072),
    ]
    assert numbers_summed(131072, 8) == (2 * 131072 * 7 // 8,) * 2


def test_documents_that_several_ranks_share() -> None:
    first = (0, 3, 3, 6, 9)
    assert shared_documents((0, 3, 3, 9), first) == [(3, 9)]
    assert shared_documents((0, 9), first) == [(0, 9)]
    assert shared_documents((0, 3, 5, 6, 9), first) == []
    assert shared_documents((0, 2, 4, 7, 9), first) == [(2, 4), (4, 7)]


def refused(options: list[dict[str, Any]]) -> None:
    mesh = worker.mesh(1, 2)
    x = torch.zeros(1, 4 - mesh.rank, 2, 3)
    given = {"q": x, "k": x, "v": x, "mesh": mesh} | options[mesh.rank]
    usp.linear_attention(**given)


def zeros(*shape: int, **more: Any) -> Tensor:
    return torch.zeros(shape, **more)


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "method": ([{"method": "rings"}, {}], "method must be one of gather, ring, got 'rings'"),
    "layout": ([{"layout": "zigzag"}] * 2, "in the order of the sequence.*got 'zigzag'"),
    "dims": ([{"q": zeros(4, 2, 3)}, {}], r"q must be \(batch, sequence, heads, head_dim\)"),
    "integers": ([{"v": zeros(1, 4, 2, 3).int()}, {}], "v must be fp16, bf16, fp32 or fp64"),
    "dtypes": ([{"v": zeros(1, 4, 2, 3).half()}, {}], "must share dtype and device"),
    "tokens": ([{"k": zeros(1, 5, 2, 3)}, {}], r"q has \(1, 4\), k has \(1, 5\)"),
    "head dims": ([{"k": zeros(1, 4, 2, 5)}, {}], "q has 3, k has 5, v has 3"),
    "heads": ([{"v": zeros(1, 4, 3, 3)}, {}], "q, k and v have 2, 2 and 3"),
    "decay": ([{"decay": zeros(3)}, {}], r"here \(2,\), \(1, 4, 2\) or .* got \(3,\)"),
    "decay of integers": ([{"decay": zeros(2).int()}, {}], "decay must be floating point"),
    "decay of one rank": ([{"decay": zeros(2)}, {}], "disagree on decay: rank 0 has heads"),
    "beta": ([{"beta": zeros(1, 4, 1)}, {}], r"beta must be .* \(1, 4, 2\), got \(1, 4, 1\)"),
    "beta of integers": ([{"beta": zeros(1, 4, 2).int()}, {}], "beta must be floating point"),
    "beta of one rank": ([{"beta": zeros(1, 4, 2)}, {}], "disagree on beta: rank 0 has True"),
    "delta without order": ([{"causal": False, "beta": zeros(1, 4, 2)}, {}], "no beta.*1, 4, 2"),
    "state": ([{"initial_state": zeros(1, 2, 3, 4)}, {}], r"= \(1, 2, 3, 3\), got \(1, 2, 3, 4\)"),
    "no order": ([{"causal": False, "decay": zeros(2)}, {}], r"causal=False has no order.*\(2,\)"),
    "no number": ([{"causal": 1}, {}], "causal must be True or False"),
    "documents": ([{"cu_seqlens": (0, 5)}] * 2, "must end with .* 7, got 5"),
    "other documents": ([{"cu_seqlens": (0, 2, 7)}, {}], "disagree on cu_seqlens"),
    "another method": ([{"method": "ring"}, {}], "disagree on method: rank 0 has ring, rank 1 has"),
    "length": ([{"seq_len": 9}] * 2, "holds 4 tokens, .* gives it 5 of 9|holds 3 tokens.* 4 of 9"),
    "gradients": ([{"q": zeros(1, 4, 2, 3, requires_grad=True)}, {}], "disagree on gradients"),
    "no tensor": ([{"q": [1.0]}, {}], "q must be a tensor"),
    "a word": ([{"validate": "yes"}, {}], "validate must be True or False"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refusals_on_every_rank(pool, case: tuple) -> None:
    options, said = case
    for outcome in pool.outcomes(refused, options, ranks=2):
        assert isinstance(outcome, RemoteError), outcome
        assert outcome.kind in ("ValueError", "TypeError")
        assert re.search(said, outcome.message), outcome.message


def other_backwards() -> None:
    mesh = worker.mesh(1, 2)
    x = torch.zeros(1, 3, 2, 3, requires_grad=True)
    first, second = (usp.linear_attention(x, x, x, mesh=mesh) for _ in range(2))
    (first if mesh.rank else second).sum().backward()


def test_backwards_of_different_calls_are_refused(pool) -> None:
    for outcome in pool.outcomes(other_backwards, ranks=2):
        assert isinstance(outcome, RemoteError)
        assert "the call whose backward this is" in outcome.message


def test_what_has_no_derivative_says_so() -> None:
    x = torch.randn(1, 5, 1, 2, requires_grad=True)
    (dx,) = torch.autograd.grad(usp.linear_attention(x, x, x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear attention has no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("decay", ["tokens", "channels"])
def test_cost_and_memory_are_linear_in_the_length(
    decay: str, delta: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With backward: products are just twice those of half as many tokens, storages at most."""
    monkeypatch.setattr(slabs, "SLAB", 2**10)
    flops, peaks = [], []
    for length in (128, 256):
        case = Case(length=length, decay=decay, delta=delta, dtype=torch.float32, plain=(0,))
        with FlopCounterMode(display=False) as counter, StorageBytes() as memory:
            run_on(None, case)
        flops.append(counter.get_total_flops())
        peaks.append(memory.peak)
    assert flops[1] == 2 * flops[0] > 0
    assert peaks[1] <= 2 * peaks[0]


def test_kernels_hold_a_state_for_many_tokens() -> None:
    """And their inputs, results and gradients; no scores."""
    case = Case(length=2048, dims=(64, 64), decay="tokens", dtype=torch.float32)
    inputs = sum(x.nbytes for x in case.whole()[0].values())
    with StorageBytes() as memory:
        run_on(None, case)
    assert memory.peak < 4 * inputs


def test_slabs_of_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(length=300, decay="channels", delta=True, states=True)
    whole = run_on(None, case)
    monkeypatch.setattr(slabs, "SLAB", 1)
    for name, found in run_on(None, case).items():
        torch.testing.assert_close(found, whole[name], rtol=1e-12, atol=1e-12, msg=name)


def test_a_normaliser_is_one_more_value_channel() -> None:
    """As docs/linear_attention.md says it, against the quadratic formula."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 67, 2, 3, dtype=torch.float64).exp() for _ in range(3))
    out = usp.linear_attention(q, k, torch.cat((v, torch.ones_like(v[..., :1])), -1))
    weights = torch.einsum("bihd,bjhd->bhij", q, k).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.einsum("bhij,bjhd->bihd", weights, v)
    torch.testing.assert_close(out[..., :-1] / out[..., -1:], expected)


def test_ssd_with_groups_is_mamba_2s_recurrence() -> None:
    torch.manual_seed(0)
    b, length, heads, groups, p, n = 2, 70, 4, 2, 3, 5
    x, dt = torch.randn(b, length, heads, p), torch.rand(b, length, heads)
    of_state, of_out = (torch.randn(b, length, groups, n) for _ in range(2))
    a, state, expected = -torch.rand(heads), torch.zeros(b, heads, p, n), []
    for t in range(length):
        write, read = (y[:, t].repeat_interleave(heads // groups, 1) for y in (of_state, of_out))
        kept = (dt[:, t] * a).exp()[..., None, None] * state
        state = kept + (dt[:, t, :, None] * x[:, t])[..., None] * write[..., None, :]
        expected.append((state * read[..., None, :]).sum(-1))
    out = usp.linear_attention(of_out, of_state, x * dt[..., None], a * dt)
    torch.testing.assert_close(out, torch.stack(expected, 1), rtol=1e-4, atol=1e-4)


def test_autocast_rounds_nothing() -> None:
    case = Case(length=70, decay="channels", delta=True, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        judge(case, [run_on(None, case)])
