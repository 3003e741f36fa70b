"""Rows and moments of a spread sequence in one graph of torch.compile, and of shapes alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any
from unittest import mock

import compiling
import pool as worker
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import usp
from usp.distributed.comm import Axis

pytestmark = pytest.mark.long

LENGTH = 11
INDUCTOR = ["inductor"] if shutil.which("g++") or shutil.which("clang++") else []
Place = tuple[int, int, Any, int | None]  # degrees, layout, seq_len
PLACES: dict[str, Place] = {
    "a row of two": (2, 1, "contiguous", LENGTH),
    "a ring of two": (1, 2, "zigzag", LENGTH),
    "both": (2, 2, "striped", LENGTH),
    "documents": (2, 2, usp.DocumentZigzag((0, 4, LENGTH)), None),
    "a rank with none": (2, 2, usp.Held((1, 7, 0, 3)), None),
}


class Model(torch.nn.Module):
    """Takes, rolls and normalizes; on request in a checkpoint."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        ulysses, ring, self.layout, self.seq_len = place
        self.mesh, self.checkpointed = worker.mesh(ulysses, ring), False
        self.shift, self.rows = 3, [0, -1, 5, 0]

    def work(self, x: Tensor) -> tuple[Tensor, ...]:
        x, sequence = torch.sin(x), (self.layout, self.seq_len)
        rolled = usp.roll(x, self.mesh, self.shift, 1, *sequence)
        variance, mean = usp.var_mean(x * rolled, self.mesh, (0, 1), keepdim=True)
        x = (x - mean) * variance + usp.var(x, self.mesh, correction=0, keepdim=True)
        usp.mean(x, self.mesh)  # nobody needs it, and the other ranks wait for it all the same
        taken = usp.take(x.movedim(1, -2), self.mesh, self.rows, -2, *sequence)
        return x * 2, taken.square()

    def forward(self, whole: Tensor) -> tuple[Tensor, ...]:
        x = usp.shard_sequence(whole, self.mesh, 1, self.layout)
        if self.checkpointed:
            return checkpoint(self.work, x, use_reentrant=False)
        return self.work(x)


def run(model: Any) -> tuple[list[Tensor], list[int]]:
    """Results and gradient, and the bytes of messages in the order in which they were sent."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, LENGTH, 3, generator=random, dtype=torch.float64).requires_grad_()
    sent: list[int] = []

    def noting(name: str) -> Callable[..., Any]:
        real = getattr(Axis, name)

        def verb(axis: Axis, message: Tensor, *others: Any) -> Any:
            sent.append(message.nbytes)
            return real(axis, message, *others)

        return verb

    verbs = {name: noting(name) for name in ("all_gather", "all_to_all")}
    with mock.patch.multiple(Axis, **verbs):
        outputs = model(x)
        cotangents = [torch.cos(out.detach() + 1) for out in outputs]
        (dx,) = torch.autograd.grad(outputs, x, cotangents)
    return [*(out.detach() for out in outputs), dx], sent


def compiled(name: str, backend: str, checkpointed: bool) -> list[str]:
    """What differs from eager."""
    wanted, sent = run(Model(PLACES[name]))
    model, compiler, wrong = Model(PLACES[name]), compiling.Counting(backend), []
    model.checkpointed = checkpointed
    with compiling.afresh():
        fast = torch.compile(model, fullgraph=True, backend=compiler)
        for _ in range(2):
            found, messages = run(fast)
            if backend != "inductor":  # which adds up in an order of its own
                same = all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
            else:
                pairs = zip(found, wanted, strict=True)
                same = all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in pairs)
            wrong += [] if same else ["another result"]
            if sorted(messages) != sorted(sent):
                wrong.append(f"sent {messages}, not {sent}")
    return wrong if compiler.graphs == 1 else [*wrong, f"{compiler.graphs} graphs"]


@pytest.mark.parametrize(
    ("name", "checkpointed"),
    [*((name, False) for name in PLACES), ("both", True), ("a rank with none", True)],
)
def test_one_graph(pool, name: str, checkpointed: bool) -> None:
    ranks = PLACES[name][0] * PLACES[name][1]
    found = pool.run(compiled, name, "aot_eager", checkpointed, ranks=ranks)
    assert found == [[]] * ranks


@pytest.mark.parametrize("backend", INDUCTOR)
def test_one_graph_of_inductor(pool, backend: str) -> None:
    assert pool.run(compiled, "both", backend, False, ranks=4) == [[]] * 4


def other_numbers(rows_are_tensors: bool) -> tuple[list[str], int]:
    """What differs from eager with new rows, shifts and lengths; and the graphs."""
    mesh, compiler, wrong = worker.mesh(2, 2), compiling.Counting("aot_eager"), []

    def model(x: Tensor, rows: Any, shift: int, whole: Tensor) -> tuple[Tensor, Tensor]:
        seq_len = whole.shape[1]
        taken = usp.take(x * 2, mesh, rows, 1, "zigzag", seq_len)
        return taken, usp.roll(x * 2, mesh, shift, 1, "zigzag", seq_len)

    with compiling.afresh():
        fast = torch.compile(model, fullgraph=True, backend=compiler)
        for i, (rows, shift) in enumerate([([0, 5], 3), ([1, -2], 2), ([3, 4], -5), ([0, 5], 3)]):
            whole, found = torch.randn(2, 11 + 4 * (i > 1), 3), []
            x = usp.shard_sequence(whole, mesh, 1, "zigzag")
            for function in (fast, model):
                y = x.clone().requires_grad_()
                given = torch.tensor(rows) if rows_are_tensors else rows
                outputs = function(y, given, shift, whole)
                if rows_are_tensors:
                    given.zero_()  # what was asked for is asked back
                out = torch.cat(outputs, 1)
                found.append((out, torch.autograd.grad(out, y, torch.cos(out.detach()))[0]))
            if not all(torch.equal(a, b) for a, b in zip(*found, strict=True)):
                wrong.append(f"{rows}, {shift}")
    return wrong, compiler.graphs


@pytest.mark.parametrize("rows_are_tensors", [False, True])
def test_other_rows_and_shifts(pool, rows_are_tensors: bool) -> None:
    """They are symbols from the second one on; a new length of the whole is another graph."""
    for wrong, graphs in pool.run(other_numbers, rows_are_tensors, ranks=4):
        assert wrong == []
        assert graphs <= 3


def beside_eager() -> list[bool]:
    """Whether what ranks 0 and 3 compute in a graph fits what the others compute."""
    mesh, found = worker.mesh(2, 2), []
    x = usp.shard_sequence(torch.arange(44.0).view(1, 11, 4), mesh, 1)

    def model(x: Tensor) -> Tensor:
        taken = usp.take(x, mesh, [2, -1], seq_len=11).sum((0, 1))
        return usp.roll(x, mesh, 1, seq_len=11) * usp.var(x, mesh) + usp.mean(x, mesh) + taken

    with compiling.afresh():
        fast = torch.compile(model, fullgraph=True, backend="aot_eager")
        for function in (model, fast if mesh.rank % 3 == 0 else model):
            y = x.clone().requires_grad_()
            out = function(y)
            found.append((out, torch.autograd.grad(out, y, torch.cos(out.detach()))[0]))
    return [torch.equal(a, b) for a, b in zip(*found, strict=True)]


def test_compiled_beside_eager(pool) -> None:
    assert pool.run(beside_eager, ranks=4) == [[True, True]] * 4


def graphs_of(name: str, named: bool) -> tuple[bool, int]:
    mesh, compiler = worker.mesh(2, 2), compiling.Counting()
    x = torch.full((2 + (mesh.rank < 3), 2), float(mesh.rank))
    options = {"seq_len": 11} if named else {}

    def model(x: Tensor) -> Tensor:
        if name == "mean":
            return usp.mean(x * 2, mesh, 0) * 2
        return getattr(usp, name)(x * 2, mesh, [1] if name == "take" else 1, 0, **options) * 2

    with compiling.afresh():
        found = torch.compile(model, backend=compiler)(x)
    return torch.equal(found, model(x)), compiler.graphs


@pytest.mark.parametrize(
    ("name", "named", "graphs"),
    [
        ("take", True, 1),
        ("roll", True, 1),
        ("mean", False, 1),
        ("take", False, 2),
        ("roll", False, 2),
    ],
)
def test_a_length_that_is_asked_for_breaks_the_graph(
    pool, name: str, named: bool, graphs: int
) -> None:
    assert pool.run(graphs_of, name, named, ranks=4) == [(True, graphs)] * 4


def said(function: Callable[[], Any]) -> str:
    with compiling.afresh():
        try:
            function()
        except ValueError as error:
            return str(error)
    return "nothing said"


def ranks_that_go_apart() -> str:
    """A backward through another output than that of the other ranks."""
    mesh = worker.mesh(2, 2)
    x = torch.randn(1, 3, 4, requires_grad=True)

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        return usp.mean(x, mesh), usp.roll(x, mesh, 1, layout=usp.Held((3,) * 4))

    outputs = [
        torch.compile(part, fullgraph=True, backend="aot_eager")(x)
        for part in (lambda x: model(x)[0], lambda x: model(x)[1])
    ]
    return said(lambda: outputs[mesh.rank % 2].sum().backward())


def test_a_backward_belongs_to_its_forward(pool) -> None:
    for each in pool.run(ranks_that_go_apart, ranks=4):
        assert "every rank's loss must depend on the same outputs" in each


def refused(name: str) -> str:
    """What is wrong, or differs on the last rank, is seen where the graph runs."""
    mesh = worker.mesh(2, 2)
    x = torch.randn(1, 3, 4)
    odd = mesh.rank == 3
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "row": lambda x: usp.take(x, mesh, [12], seq_len=12),
        "rows": lambda x: usp.take(x, mesh, [1 + odd], seq_len=12),
        "share": lambda x: usp.roll(x, mesh, 1, seq_len=11 if odd else 12),
        "shift": lambda x: usp.roll(x, mesh, 1 + odd, seq_len=12),
        "correction": lambda x: usp.var(x, mesh, correction=int(odd)),
        "place": lambda x: usp.mean(x, mesh) if odd else usp.var(x, mesh, correction=0),
    }
    return said(lambda: torch.compile(calls[name], fullgraph=True, backend="aot_eager")(x))


REFUSALS = {
    "row": "there is no row 12 in a sequence of 12 tokens",
    "rows": "disagree on rows: rank 0 has [1], rank 3 has [2]",
    "share": "gives it 2 of 11",
    "shift": "disagree on shift: rank 0 has 1, rank 3 has 2",
    "correction": "disagree on correction: rank 0 has 0.0, rank 3 has 1.0",
    "place": "rank 0 calls usp.var, rank 3 calls usp.mean",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_on_every_rank(pool, name: str) -> None:
    for each in pool.run(refused, name, ranks=4):
        assert REFUSALS[name] in each


def shapes() -> list[bool]:
    """Whether shapes alone are those of eager; and nobody waits for another."""
    found = []
    for name, place in PLACES.items():
        if place[0] * place[1] == 4:
            model = Model(place)
            wanted = [tuple(x.shape) for x in run(model)[0]]
            with FakeTensorMode() as mode:
                x = mode.from_tensor(torch.randn(2, LENGTH, 3)).requires_grad_()
                outputs = model(x)
                if model.mesh.rank == 0 or name == "both":
                    torch.cat([out.flatten() for out in outputs]).sum().backward()
                    outputs = (*outputs, x.grad)
            found.append([tuple(x.shape) for x in outputs] == wanted[: len(outputs)])
    return found


def test_shapes_alone(pool) -> None:
    assert pool.run(shapes, ranks=4) == [[True] * 3] * 4


def one_rank() -> tuple[list[Tensor], list[Tensor], int]:
    """A mesh of size 1."""
    mesh, compiler = worker.mesh(1, 1), compiling.Counting("aot_eager")
    x = torch.arange(42.0).view(2, 7, 3).sin()

    def model(x: Tensor) -> list[Tensor]:
        taken, rolled = usp.take(x * 2, mesh, [0, -1]), usp.roll(x * 2, mesh, 2)
        return [taken, rolled, *usp.var_mean(x, mesh)]

    with compiling.afresh():
        found = torch.compile(model, fullgraph=True, backend=compiler)(x)
    return found, model(x), compiler.graphs


def test_a_mesh_of_one(pool) -> None:
    ((found, wanted, graphs),) = pool.run(one_rank, ranks=1)
    assert graphs == 1
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
