"""Linear attention as a module; layers of both kinds on one mesh are the model on one device."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pool as worker
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import usp
from usp.testing import dense_attention, linear_recurrence

WIDTH, HEADS, LENGTH = 6, 2, 13
DOCUMENTS = (0, 4, 4, 9, LENGTH)
KINDS = ("heads", "tokens", "channels", "softmax")


class Mixer(nn.Module):
    """One layer: linear attention with a decay of its kind, or softmax attention.

    Args:
        kind: Of KINDS.
        dense: The oracle in the place of usp.
    """

    def __init__(self, kind: str, method: str, dense: bool) -> None:
        super().__init__()
        self.kind, self.dense = kind, dense
        self.packed, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        gates = {"tokens": HEADS, "channels": WIDTH}.get(kind)
        self.gate = None if gates is None else nn.Linear(WIDTH, gates)
        self.attention: nn.Module
        if kind == "softmax":
            self.attention = usp.LongContextAttention(causal=True)
        else:
            decay = nn.Parameter(torch.tensor([-0.1, -0.7])) if kind == "heads" else None
            self.attention = usp.LinearAttention(decay=decay, method=method)

    def forward(self, x: Tensor, spread: usp.Spread) -> Tensor:
        q, k, v = self.packed(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        given = () if self.gate is None else (self._decay(x),)
        if not self.dense:
            out = self.attention(q, k, v, *given, spread=spread)
        elif self.kind == "softmax":
            out, _ = dense_attention(q, k, v, causal=True, cu_seqlens=spread.cu_seqlens)
        else:
            given = given or (self.attention.decay,)
            out, _ = linear_recurrence(q, k, v, *given, cu_seqlens=spread.cu_seqlens)
        return self.out(out.flatten(2))

    def _decay(self, x: Tensor) -> Tensor:
        assert self.gate is not None
        logs = F.logsigmoid(self.gate(x))
        return logs.unflatten(-1, (HEADS, -1)) if self.kind == "channels" else logs


class Hybrid(nn.Module):
    def __init__(self, method: str = "gather", dense: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mixer(kind, method, dense) for kind in KINDS)

    def forward(self, x: Tensor, spread: usp.Spread, again: bool = False) -> Tensor:
        for layer in self.layers:
            y = F.layer_norm(x, (WIDTH,))
            x = x + (
                checkpoint(layer, y, spread, use_reentrant=False) if again else layer(y, spread)
            )
        return x


def made(method: str = "gather", dense: bool = False) -> Hybrid:
    torch.manual_seed(0)
    return Hybrid(method, dense).double()


def tokens() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    x, cotangent = torch.randn(2, 2, LENGTH, WIDTH, generator=random, dtype=torch.float64)
    return x, cotangent


@functools.cache
def expected() -> tuple[Tensor, ...]:
    model, (x, cotangent) = made(dense=True), tokens()
    x.requires_grad_()
    out = model(x, usp.Spread(None, seq_len=LENGTH, cu_seqlens=DOCUMENTS))
    return out.detach(), *torch.autograd.grad(out, [x, *model.parameters()], cotangent)


def run(ulysses: int, ring: int, method: str) -> list[Tensor]:
    """On a worker: the whole result and gradients of x, and those of the parameters, summed."""
    mesh = worker.mesh(ulysses, ring)
    spread = usp.Spread(mesh, seq_len=LENGTH, cu_seqlens=DOCUMENTS)
    model, (x, cotangent) = made(method), (spread.shard(t) for t in tokens())
    x.requires_grad_()
    out = model(x, spread, method == "ring")  # and with activation checkpoints
    (out * cotangent).sum().backward()
    usp.all_reduce_gradients(model, mesh)
    whole = [usp.unshard_sequence(t, mesh, 1, seq_len=LENGTH) for t in (out.detach(), x.grad)]
    return [*whole, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(
    ("ulysses", "ring", "method"),
    [
        (1, 2, "gather"),
        (2, 1, "ring"),
        pytest.param(2, 2, "gather", marks=pytest.mark.long),
        pytest.param(4, 1, "ring", marks=pytest.mark.long),
    ],
)
def test_a_hybrid_stack_with_every_gradient(pool, ulysses: int, ring: int, method: str) -> None:
    """LASP-2H: linear layers of three kinds of decay and a softmax layer, packed documents."""
    for found in pool.run(run, ulysses, ring, method, ranks=ulysses * ring):
        for ours, wanted in zip(found, expected(), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


def test_it_copies_pickles_and_tells_what_it_is() -> None:
    decay = nn.Parameter(torch.tensor([-0.5]))
    module = usp.LinearAttention(decay=decay, method="ring", return_state=True)
    x = torch.randn(1, 5, 1, 2)
    out, state = module(x, x, x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x, x, x)[0], out)
    wanted, last = linear_recurrence(x, x, x, decay)
    torch.testing.assert_close((out.double(), state.double()), (wanted, last), rtol=1e-5, atol=1e-5)
    assert repr(module) == "LinearAttention(mesh=None, method='ring', return_state=True)"
    assert list(module.state_dict()) == ["decay"]
    assert not usp.LinearAttention(decay=decay.detach()).state_dict()


def test_a_state_goes_on_where_another_call_ended() -> None:
    """A prompt in two halves, and then a token at a time."""
    x = torch.randn(2, 9, 1, 3, dtype=torch.float64)
    logs = -torch.rand(2, 9, 1, 3, dtype=torch.float64)
    module, state, found = usp.LinearAttention(return_state=True), None, []
    for part in (slice(0, 4), slice(4, 7), slice(7, 8), slice(8, 9)):
        out, state = module(*[x[:, part]] * 3, logs[:, part], initial_state=state)
        found.append(out)
    torch.testing.assert_close(torch.cat(found, 1), module(x, x, x, logs)[0])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "twice": ({"spread": usp.Spread(None, seq_len=3), "seq_len": 3}, "leave out the others"),
    "layout": ({"spread": usp.Spread(None, "striped", 3)}, "order of the sequence.*'striped'"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refusals(case: tuple[dict[str, Any], str]) -> None:
    options, said = case
    x = torch.zeros(1, 3, 1, 1)
    with pytest.raises(ValueError, match=said):
        usp.LinearAttention()(x, x, x, **options)
    with pytest.raises(ValueError, match="validate must be one of"):
        usp.LinearAttention(validate="yes")
