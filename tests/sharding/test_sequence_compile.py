"""Cut and join in one graph of torch.compile, and of tensors that have shapes alone."""

from __future__ import annotations

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

LENGTH = 11
LAYOUTS: dict[str, tuple[Any, int | None]] = {
    "striped": ("striped", LENGTH),
    "documents": (usp.DocumentZigzag((0, 4, LENGTH)), None),
    "held": (usp.Held((1, 7, 0, 3)), None),
}


class Model(torch.nn.Module):
    """Cuts, looks its positions up, and joins; on request in a checkpoint."""

    def __init__(self, mesh: usp.SequenceMesh, layout: Any, seq_len: int | None) -> None:
        super().__init__()
        self.mesh, self.layout, self.seq_len = mesh, layout, seq_len
        self.checkpointed = False

    def join(self, x: Tensor) -> Tensor:
        return usp.unshard_sequence(torch.sin(x), self.mesh, -2, self.layout, self.seq_len)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        own = usp.shard_sequence(x * 2, self.mesh, 1, self.layout)
        own = own * usp.positions(LENGTH, self.mesh, self.layout, "cpu")[:, None]
        whole = checkpoint(self.join, own, use_reentrant=False) if self.checkpointed else None
        return own, self.join(own) if whole is None else whole


def run(model: Any) -> tuple[list[Tensor], int]:
    """Results and gradient, and how many messages of tokens were sent."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, LENGTH, 3, generator=random, dtype=torch.float64).requires_grad_()
    with (
        mock.patch.object(Axis, "all_gather", autospec=True, side_effect=Axis.all_gather) as sent,
        mock.patch.object(Axis, "all_to_all", autospec=True, side_effect=Axis.all_to_all) as back,
    ):
        outputs = model(x)
        cotangents = [torch.cos(out.detach() + 1) for out in outputs]
        (dx,) = torch.autograd.grad(outputs, x, cotangents)
    return [*(out.detach() for out in outputs), dx], sent.call_count + back.call_count


def compiled(name: str) -> list[str]:
    """What differs from eager."""
    mesh, wrong = worker.mesh(2, 2), []
    wanted, sent = run(Model(mesh, *LAYOUTS[name]))
    for checkpointed in (False, True):
        model, compiler = Model(mesh, *LAYOUTS[name]), compiling.Counting("aot_eager")
        model.checkpointed = checkpointed
        with compiling.afresh():
            found, count = run(torch.compile(model, fullgraph=True, backend=compiler))
        if not all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)):
            wrong.append(f"checkpointed {checkpointed}: another result")
        if (count, compiler.graphs) != (sent, 1):
            wrong.append(f"{checkpointed=}: {count} messages, not {sent}; {compiler.graphs} graphs")
    return wrong


@pytest.mark.long
@pytest.mark.parametrize("name", LAYOUTS)
def test_one_graph(pool, name: str) -> None:
    assert pool.run(compiled, name, ranks=4) == [[]] * 4


def asked() -> tuple[bool, int]:
    """A length that nobody named."""
    mesh, compiler = worker.mesh(2, 2), compiling.Counting()

    def model(x: Tensor) -> Tensor:
        return usp.unshard_sequence(x * 2, mesh, 0) * 2

    x = torch.full((2 + (mesh.rank < 3), 2), float(mesh.rank))
    with compiling.afresh():
        found = torch.compile(model, backend=compiler)(x)
    return torch.equal(found, model(x)), compiler.graphs


def test_a_length_that_is_asked_for_breaks_the_graph(pool) -> None:
    assert pool.run(asked, ranks=4) == [(True, 2)] * 4


def shapes() -> list[Any]:
    mesh = worker.mesh(2, 2)
    found = []
    for name, sequence in LAYOUTS.items():
        model = Model(mesh, *sequence)
        with FakeTensorMode() as mode:
            x = mode.from_tensor(torch.randn(2, LENGTH, 3)).requires_grad_()
            out, whole = model(x)
            whole.sum().backward()
            found.append((tuple(out.shape), tuple(whole.shape), tuple(x.grad.shape)))
        out, whole = model(torch.randn(2, LENGTH, 3))  # no table holds fake values
        found[-1] += (name, tuple(out.shape) == found[-1][0], bool(whole.isfinite().all()))
    return found


def test_shapes_alone(pool) -> None:
    for parts in pool.run(shapes, ranks=4):
        for out, whole, gradient, name, same, finite in parts:
            assert same and finite, name
            assert out[1] < LENGTH and whole == gradient == (2, LENGTH, 3)
