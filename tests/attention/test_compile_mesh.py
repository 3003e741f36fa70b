"""torch.compile on a mesh: one graph, right, and no rank waits for another in vain."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import Any
from unittest import mock

import compiling
import pool as worker
import pytest
import torch
import torch.distributed as dist
from cases import Case, local, seen
from judge import assert_close, join, oracle
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import usp
from usp import masks
from usp.distributed.comm import Axis

pytestmark = pytest.mark.long

INDUCTOR = ["inductor"] if shutil.which("g++") or shutil.which("clang++") else []
EVERYTHING = {
    "causal": True,
    "padding": 0.2,
    "bias": "hq",
    "bias_hides": 0.1,
    "alibi": "h",
    "softcap": 4.0,
    "dropout_p": 0.3,
    "return_lse": True,
}
CASES = {
    "both axes, everything": Case(ulysses=2, ring=2, seq_len=13, heads=3, kv_heads=3, **EVERYTHING),
    "shared heads, a rank with none": Case(
        ulysses=4, batch=2, seq_len=10, heads=3, bias="b", window=(3, None)
    ),
    "tokens as they are": Case(
        ulysses=2, ring=2, seq_len=9, layout="held", counts=(1, 6, 0, 2), heads=2, causal=True
    ),
    "keys as they are": Case(
        ulysses=2, ring=2, seq_len=9, key_layout="held", key_counts=(0, 0, 8, 1), causal=True
    ),
    "queries on every rank": Case(
        ulysses=2, ring=2, seq_len=3, key_len=13, heads=3, replicated="queries", return_lse=True
    ),
    "keys on every rank": Case(
        ulysses=2, ring=2, seq_len=13, key_len=5, layout="zigzag", replicated="keys", bias="hq"
    ),
    # one query a rank: it cannot tell a row of a bias of its own from one for all
    "ring, single queries": Case(
        ulysses=2,
        ring=2,
        batch=2,
        seq_len=5,
        key_len=11,
        heads=4,
        kv_heads=2,
        bias="q",
        layout="striped",
        transport="allgather",
        bias_fill=-1e9,
    ),
    "a mask for all": Case(
        ulysses=2, ring=2, seq_len=11, heads=3, kv_heads=3, unions="one", seed=10
    ),
    "a mask for each sample": Case(
        ulysses=1, ring=2, batch=3, seq_len=11, heads=2, unions="each", key_lengths=True, seed=3
    ),
    "cached keys": Case(
        ulysses=2, batch=2, seq_len=7, key_len=13, heads=2, causal=True, query_offset=-1, seed=1
    ),
}


def compiled(case: Case, named: bool) -> tuple[dict[str, Tensor], int]:
    """This rank's results and gradients, and the number of graphs."""
    mesh, t = worker.mesh(case.ulysses, case.ring), local(case, dist.get_rank())
    compiler, layout, drawn = compiling.Counting("aot_eager"), case.placed, seen(case).given

    def model(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        result = usp.long_context_attention(
            q * 2,
            k,
            v,
            mesh,
            **case.masks,
            **drawn,
            layout=layout,
            seq_len=(case.seq_len, case.num_keys) if named else None,
            key_padding_mask=t.padding,
            attn_bias=bias,
            dropout_p=case.dropout_p,
            dropout_seed=case.dropout_seed,
            alibi_slopes=t.slopes,
            transport=case.transport,
            return_lse=case.return_lse,
            **({} if case.replicated is None else {case.replicated: "replicated"}),
        )
        return result if isinstance(result, tuple) else (result,)

    leaves = [x.clone().requires_grad_() for x in (t.q / 2, t.k, t.v, t.bias) if x is not None]
    with compiling.afresh():
        given = leaves if t.bias is not None else [*leaves, None]
        outputs = torch.compile(model, fullgraph=True, backend=compiler)(*given)
        dq, *others = torch.autograd.grad(outputs, leaves, [t.dout, t.dlse][: len(outputs)])
    names = [*("out", "lse")[: len(outputs)], "dq", "dk", "dv", "dbias"]
    results = [*(x.detach() for x in outputs), dq / 2, *others]
    return dict(zip(names, results, strict=False)), compiler.graphs


# whose lengths are given, and not asked for
NAMED = ("both axes, everything", "shared heads, a rank with none", "tokens as they are")
NAMED += ("a mask for each sample",)


@pytest.mark.parametrize(
    ("name", "named"), [*((name, False) for name in CASES), *((name, True) for name in NAMED)]
)
def test_one_graph(pool, name: str, named: bool) -> None:
    case = CASES[name]
    parts = pool.run(compiled, case, named, ranks=case.ranks)
    assert_close(case, join(case, [results for results, _ in parts]), oracle(case))
    assert [graphs for _, graphs in parts] == [1] * case.ranks


class Layers(torch.nn.Module):
    """Attention twice, with dropout, checkpointed on request."""

    def __init__(self, mesh: usp.SequenceMesh, checkpointed: bool) -> None:
        super().__init__()
        self.attention = usp.LongContextAttention(mesh, causal=True, dropout_p=0.3)
        self.checkpointed = checkpointed

    def layer(self, x: Tensor) -> Tensor:
        x = torch.sin(x)
        return torch.cos(x) + self.attention(x, torch.tanh(x), x * 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = (
                checkpoint(self.layer, x, use_reentrant=False)
                if self.checkpointed
                else self.layer(x)
            )
        self.attention(x, x, x)  # nobody needs it, and the other ranks wait for it all the same
        return x * 2


def trained(model: Any, x: Tensor) -> tuple[list[Tensor], Counter[str]]:
    """Results and gradient; what was sent, by verb."""
    sent: Counter[str] = Counter()

    def counting(name: str) -> Any:
        real = getattr(Axis, name)

        def verb(axis: Axis, message: Tensor, *others: Any, **named: Any) -> Any:
            sent[name] += 1
            sent[f"{name} bytes"] += message.nbytes
            return real(axis, message, *others, **named)

        return verb

    torch.manual_seed(dist.get_rank())  # whose seed counts is that of the first rank
    x = x.clone().requires_grad_()
    verbs = {name: counting(name) for name in ("shift", "all_gather", "all_to_all")}
    with mock.patch.multiple(Axis, **verbs):
        out = model(x)
        (dx,) = torch.autograd.grad(out, x, torch.cos(out.detach()))
    return [out.detach(), dx], sent


def compiled_layers(backend: str, checkpointed: bool) -> list[str]:
    """What differs from eager."""
    import torch._inductor.config

    mesh = worker.mesh(2, 2)
    random = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(1, 2 + (mesh.rank < 3), 3, 4, dtype=torch.float64, generator=random)
    model, wrong = Layers(mesh, checkpointed), []
    wanted, sent = trained(Layers(mesh, False), x)
    with compiling.afresh(), torch._inductor.config.patch(fallback_random=True):
        fast = torch.compile(model, fullgraph=True, backend=backend)
        for number in range(2):
            found, calls = trained(fast, x)
            for a, b in zip(found, wanted, strict=True):
                if not torch.allclose(a, b, rtol=0, atol=1e-12):
                    wrong.append(f"call {number}: {(a - b).abs().max()}")
            if calls != sent:
                wrong.append(f"call {number}: sent {calls}, not {sent}")
    return wrong


@pytest.mark.parametrize(
    ("backend", "checkpointed"),
    [("aot_eager", True), *((backend, False) for backend in INDUCTOR)],
)
def test_nothing_is_sent_twice_or_left_out(pool, backend: str, checkpointed: bool) -> None:
    assert pool.run(compiled_layers, backend, checkpointed, ranks=4) == [[]] * 4


def ranks_that_go_apart() -> str:
    """A backward through another output than that of the other ranks."""
    mesh = worker.mesh(2, 2)
    x = torch.randn(1, 3, 4, 2, requires_grad=True)

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(usp.long_context_attention(y, y, y, mesh) for y in (x, x * 2))

    with compiling.afresh():
        outputs = [
            torch.compile(part, fullgraph=True, backend="aot_eager")(x)
            for part in (lambda x: model(x)[0], lambda x: model(x)[1])
        ]
    try:
        outputs[mesh.rank % 2].sum().backward()
    except ValueError as error:
        return str(error)
    return "nothing said"


def test_a_backward_belongs_to_its_forward(pool) -> None:
    for said in pool.run(ranks_that_go_apart, ranks=4):
        assert "every rank's loss must depend on the same outputs" in said


def one_rank_is_compiled() -> tuple[bool, str]:
    """Ranks understand each other, whoever is compiled; and say so where gradients differ."""
    mesh = worker.mesh(2, 2)
    x = torch.randn(1, 3, 4, 2, requires_grad=True)

    def model(x: Tensor) -> Tensor:
        return usp.long_context_attention(x, x, x, mesh)

    with compiling.afresh():
        fast = torch.compile(model, fullgraph=True, backend="aot_eager")
        out = (fast if mesh.rank == 1 else model)(x)
        out.sum().backward()
        try:
            fast(x if mesh.rank else x.detach())
        except ValueError as error:
            return bool(x.grad.isfinite().all()), str(error)
    return False, "nothing said"


def test_compiled_beside_eager(pool) -> None:
    for right, said in pool.run(one_rank_is_compiled, ranks=4):
        assert right
        assert "ranks of the mesh disagree on gradients needed" in said


def other_lengths() -> tuple[float, int]:
    """The largest difference to eager, and the number of graphs, of other lengths."""
    mesh, compiler = worker.mesh(2, 2), compiling.Counting("aot_eager")
    module, wrong = usp.LongContextAttention(mesh, causal=True), 0.0
    with compiling.afresh():
        fast = torch.compile(module, fullgraph=True, backend=compiler)
        for length in (11, 15, 10, 14):
            whole = torch.randn(2, length, 3, 2, generator=torch.Generator().manual_seed(length))
            x = usp.shard_sequence(whole, mesh, 1)
            wrong = max(wrong, (fast(x, x * 2, x) - module(x, x * 2, x)).abs().max().item())
    return wrong, compiler.graphs


def test_other_lengths_do_not_compile_for_ever(pool) -> None:
    for wrong, graphs in pool.run(other_lengths, ranks=4):
        assert wrong == 0.0
        assert graphs <= 2, "what this rank holds is symbolic from the second one on"


def other_masks(ulysses: int, ring: int) -> tuple[list[str], int]:
    """What differs from eager where masks and lengths are new at each call; and the graphs."""
    mesh, compiler, wrong = worker.mesh(ulysses, ring), compiling.Counting("aot_eager"), []
    x = usp.shard_sequence(torch.randn(2, 11, 4, 3, dtype=torch.float64), mesh, 1)

    def model(x: Tensor, mask: Any, lengths: Tensor) -> Tensor:
        return usp.long_context_attention(x * 2, x, x, mesh, mask=mask, key_lengths=lengths)

    with compiling.afresh():
        fast = torch.compile(model, fullgraph=True, backend=compiler)
        for left, length in ((3, 11), (5, 4), (2, 0), (9, 7), (3, 11)):
            mask = [masks.window(left, 1), masks.causal() & masks.first_keys(left)]
            given, found = (mask, torch.tensor((length, 10))), []
            for function in (fast, model):
                y = x.clone().requires_grad_()
                # each rank makes its graph by itself: one that has none understands the others
                out = (model if mesh.rank == 1 and left == 5 else function)(y, *given)
                found.append((out, torch.autograd.grad(out, y, torch.cos(out.detach()))[0]))
            if not all(torch.equal(a, b) for a, b in zip(*found, strict=True)):
                wrong.append(f"{mask}, {length}")
    return wrong, compiler.graphs


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2)], ids=str)
def test_other_masks_do_not_compile_again(pool, shape: tuple[int, int]) -> None:
    for wrong, graphs in pool.run(other_masks, *shape, ranks=shape[0] * shape[1]):
        assert wrong == []
        assert graphs <= 2, "numbers of masks are symbolic from the second one on"


def masks_that_differ() -> str:
    mesh = worker.mesh(2, 2)
    x = torch.randn(1, 3, 4, 2)

    def model(x: Tensor, mask: Any) -> Tensor:
        return usp.long_context_attention(x, x, x, mesh, mask=mask)

    with compiling.afresh():
        fast = torch.compile(model, fullgraph=True, backend="aot_eager")
        fast(x, masks.window(2, 1))
        try:
            fast(x, masks.window(2 + mesh.rank // 3, 1))
        except ValueError as error:
            return str(error)
    return "nothing said"


def test_masks_that_differ_among_ranks(pool) -> None:
    for said in pool.run(masks_that_differ, ranks=4):
        assert "ranks of the mesh disagree on mask" in said


def dtensor_inputs() -> str:
    from torch.distributed.tensor import DTensor, Shard

    q = torch.randn(1, 3, 4, 2)
    axis = worker.mesh(2, 2).device_mesh["ring"]
    x = DTensor.from_local(q, axis, [Shard(1)])
    with compiling.afresh():
        try:
            torch.compile(usp.long_context_attention, backend="aot_eager")(x, x, x)
        except NotImplementedError as error:
            return str(error)
    return "nothing said"


def test_tensors_that_are_spread_themselves(pool) -> None:
    for said in pool.run(dtensor_inputs, ranks=4):
        assert said == "q is a DTensor: pass this rank's shard of the sequence, x.to_local()"


def meetings_of_calls(validate: str) -> list[int]:
    """How often the ranks meet at each call, where a device would be waited for."""
    mesh, counts = worker.mesh(2, 2), []
    module = usp.LongContextAttention(mesh, seq_len=11, validate=validate)
    real = type(mesh).gather_numbers

    def counted(mesh: usp.SequenceMesh, *numbers: int) -> Any:
        counts[-1] += 1
        return real(mesh, *numbers)

    x = torch.randn(1, 2 + (mesh.rank < 3), 4, 2)
    with (
        compiling.afresh(),
        mock.patch.multiple(type(mesh), device_type="elsewhere", gather_numbers=counted),
    ):
        fast = torch.compile(module, fullgraph=True, backend="aot_eager")
        for _ in range(3):
            counts.append(0)
            fast(x, x, x)
    return counts


@pytest.mark.parametrize(
    ("validate", "counts"), [("first", [1, 0, 0]), ("always", [1, 1, 1]), ("never", [0, 0, 0])]
)
def test_when_ranks_meet(pool, validate: str, counts: list[int]) -> None:
    assert pool.run(meetings_of_calls, validate, ranks=4) == [counts] * 4
