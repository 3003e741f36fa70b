"""Kernels of a GPU are held against the recurrence in fp64 before they are used there.

At the first use for a dtype and head dims, in a process of its own; the verdict is kept, as those
of attention's kernels (``backends/trust.py``).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from usp.linear_attention.kernels import Family, Tokens, Traits
from usp.machine.apart import begin
from usp.ops.tried import may_run
from usp.planning.problem import state_dtype

# Of the largest value of a kind: who is right is off by a few roundings of what it multiplies.
ALLOWED = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}


def is_trusted(family: Any, traits: Traits) -> bool:
    """Whether a family that takes a problem may do it, as far as anybody asks.

    Args:
        family: A module with the functions of ``Family``.
    """
    dtype = str(traits.dtype).removeprefix("torch.")
    kind = "channels" if traits.decay == "channels" else "tokens"
    about = family.__name__, dtype, *map(str, traits.dims), kind
    return may_run("linear attention", family.NAME, check, traits.device, about)


def check(told: list[str]) -> str | None:
    """What is wrong with a family on a device, or None.

    Args:
        told: ``[name, device, module, dtype, D, Dv, kind]``; the kind is "channels", or "tokens"
            for every other decay.
    """
    _, where, module, dtype, dim, value_dim, kind = told
    family, device = importlib.import_module(module), torch.device(where)
    begin(device)
    for decay in ("a decay a channel",) if kind == "channels" else ("a decay a token", "no decay"):
        given = _problem(getattr(torch, dtype), (int(dim), int(value_dim)), decay)
        found = results(family, *(_on(x, device) for x in given))
        for name, right in expected(*given).items():
            allowed = ALLOWED[dtype] * max(1.0, right.abs().max().item())
            error = (found[name].double().cpu() - right).abs().max().item()
            if not error <= allowed:  # NaN too
                return f"{name} is off by {error:.2g} where {allowed:.2g} is allowed ({decay})"
    return None


Problem = tuple[Tokens, Tensor, Tensor, Tensor]


def _problem(dtype: torch.dtype, dims: tuple[int, int], decay: str) -> Problem:
    """More tokens than two chunks have; heads that share; and documents, where it decays."""
    random = torch.Generator(device="cpu").manual_seed(2026)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        x = torch.randn(shape, generator=random, dtype=torch.float64, device="cpu")
        return x.to(dtype)

    (d, e), state = dims, state_dtype(dtype)
    q, k, v = normal(2, 150, 1, d), normal(2, 150, 2, d), normal(2, 150, 4, e)
    g = None
    if decay != "no decay":
        channels = (d,) if decay == "a decay a channel" else ()
        g = -normal(2, 150, 4, *channels, dtype=state).abs()
        g[:, [0, 70, 131]] = -torch.inf
    before, behind = (normal(2, 4, d, e, dtype=state) for _ in range(2))
    return Tokens(q, k, v, g), before, normal(2, 150, 4, e), behind


def _on(x: Any, device: torch.device) -> Any:
    if isinstance(x, Tokens):
        return Tokens(*(_on(y, device) for y in x))
    return None if x is None else x.to(device)


def results(
    family: Family, tokens: Tokens, before: Tensor, dout: Tensor, behind: Tensor
) -> dict[str, Tensor]:
    """All that a family's functions give.

    Args:
        before, behind: The state before the tokens, and the gradient of that behind them.
        dout: That of what tokens see.
    """
    update, kept = family.update(tokens)
    out, final, saved = family.forward(tokens, before, kept, True)
    of_state, kept = family.update_backward(tokens, dout)
    found = family.backward(tokens, saved, dout, behind, kept, tokens.g is not None)
    names = "update", "out", "final", "of state", "dq", "dk", "dv", "dg", "dbefore"
    given = zip(names, (update, out, final, of_state, *found), strict=True)
    return {name: x for name, x in given if x is not None}


def expected(tokens: Tokens, before: Tensor, dout: Tensor, behind: Tensor) -> dict[str, Tensor]:
    """The same by the recurrence, in fp64."""
    from usp.testing import linear_recurrence

    leaves = [x.detach().double().requires_grad_() for x in (*tokens, before) if x is not None]
    q, k, v, *others, state = leaves
    decay = None
    if others:
        decay = others[0].expand(*q.shape[:2], tokens.heads, *others[0].shape[3:])
    with torch.enable_grad():
        out, final = linear_recurrence(q, k, v, decay, initial_state=state)
        update = linear_recurrence(q, k, v, decay)[1]

    def gradients(dstate: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            [out, final],
            leaves,
            [dout.double(), dstate.double()],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )

    names = ["dq", "dk", "dv", *(["dg"] if others else []), "dbefore"]
    found = dict(zip(names, gradients(behind), strict=True))
    found["of state"] = gradients(torch.zeros_like(behind))[-1]
    return found | {"update": update.detach(), "out": out.detach(), "final": final.detach()}
