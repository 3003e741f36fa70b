"""Linear attention as one op, for graphs of ``torch.compile``: what runs in it is what runs without
a graph, kernels and the exchange of states, forward and backward.

The overload ``mesh``, which has an effect, is for graphs on a mesh (``distributed.graph``). Ranks
meet where it runs. The delta rule is no part of it (``op``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from usp.distributed.agreement import meet_before_backward
from usp.distributed.graph import has_effect, saved_in_graph
from usp.linear_attention import families, fused, native, plain
from usp.linear_attention.kernels import Family, Tokens, Traits
from usp.linear_attention.op import SETTINGS, Settings
from usp.ops.derivatives import OnceDifferentiable, without_second_derivative
from usp.planning.problem import state_dtype

_LIBRARY = torch.library.Library("usp", "FRAGMENT")
_TENSORS = 5


def attend(tokens: Tokens, initial: Tensor, given: Settings) -> tuple[Tensor, Tensor | None]:
    """``fused.attend`` through the op."""
    out, final, _ = _overload("linear_attention", given)(*tokens, initial, *given)
    return out, final if given.returns else None


Found = tuple[Tensor, Tensor, list[Tensor]]


def _overload(op: str, given: Settings) -> Any:
    return getattr(getattr(torch.ops.usp, op), "default" if given.mesh is None else "mesh")


def _family(tokens: Tokens) -> Family:
    q, g = tokens.q, tokens.g
    decay = None if g is None else "channels" if g.dim() == 4 else "tokens"
    traits = Traits(q.device, q.dtype, (q.shape[3], tokens.v.shape[3]), decay)
    return families.chosen(traits) or cast(Family, plain)


def _forward(*args: Any) -> Found:
    tokens, initial, given = Tokens(*args[:4]), args[4], Settings(*args[_TENSORS:])
    shapes = (tokens.q.dtype, _transition_shape(tokens), *(x.shape[2:] for x in tokens[:3]))
    name = given.meet((tokens.q.shape[0], *shapes))
    with torch.no_grad():
        done = fused.forward(tokens, initial, _family(tokens), given.chain, any(given.needed))
    final = initial.new_empty(0) if done.final is None else done.final
    # strides as the graph was told
    kept = [torch.tensor(name, device="cpu"), *(x.contiguous() for x in done.of_ranks)]
    for states in done.saved:
        count = _kept_states(tokens)
        # an output is nobody's input, as the initial state may be
        is_own = len(states) == count and states.data_ptr() != initial.data_ptr()
        kept.append(states if is_own else _filled_up(states, count))
    return done.out.contiguous(), final.contiguous(), kept


def _kept_states(tokens: Tokens) -> int:
    """Room for those of whichever family will take the problem on the device, and of none too."""
    if tokens.q.device.type != "cpu":
        return 1
    return cast(int, torch.sym_max(native.segments(tokens.q.shape[1]), 1))


def _filled_up(states: Tensor, count: int) -> Tensor:
    """(count, ...) that begin with these."""
    room = states.new_zeros(count, *states.shape[1:])
    room[: len(states)] = states
    return room


def _transition_shape(tokens: Tokens) -> tuple[int, ...]:
    """Of what all tokens do to a state, (b, h, d, 1)."""
    g = tokens.g
    if g is None:
        return 1, 1, 1, 1
    return g.shape[0], g.shape[2], g.shape[3] if g.dim() == 4 else 1, 1


def _fake_forward(*args: Any) -> Found:
    tokens, initial, given = Tokens(*args[:4]), args[4], Settings(*args[_TENSORS:])
    q, dtype = tokens.q, state_dtype(tokens.q.dtype)
    out = q.new_empty((*q.shape[:2], tokens.heads, tokens.v.shape[3]))
    final = initial.new_empty(initial.shape if given.returns else 0)
    ranks = 0 if given.mesh is None else 1 if given.method == "ring" else len(given.first) - 1
    kept = [torch.empty((), dtype=torch.int64, device="cpu")]
    kept += [q.new_empty(_transition_shape(tokens), dtype=dtype) for _ in range(ranks)]
    if any(given.needed):
        kept.append(q.new_empty((_kept_states(tokens), *tokens.state_shape), dtype=dtype))
    return out, final, kept


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _needs(given: Settings) -> tuple[bool, ...]:
    """Whether q, k, v, g and the initial state need a gradient; the same on every rank."""
    *of_tokens, _, initial = given.needed
    return *of_tokens, initial


def _gradients(
    dout: Tensor, dfinal: Tensor | None, kept: Sequence[Tensor], *args: Any
) -> Gradients:
    tokens, given = Tokens(*args[:4]), Settings(*args[4:])
    name, *of_ranks, states = kept
    done = fused.Done(dout, None, tuple(of_ranks), (states,))

    def meet() -> None:
        if given.on is not None and name:
            meet_before_backward(given.on, int(name))

    with torch.no_grad():
        of = _family(tokens), given.chain
        found = fused.backward(tokens, done, dout, dfinal, *of, _needs(given), meet)
    dq, dk, dv, dg, dinitial = (dout.new_empty(0) if x is None else x.contiguous() for x in found)
    return dq, dk, dv, dg, dinitial


def _fake_gradients(
    dout: Tensor, dfinal: Tensor | None, kept: Sequence[Tensor], *args: Any
) -> Gradients:
    tokens, needs = Tokens(*args[:4]), _needs(Settings(*args[4:]))
    q, k, v, g = (
        x.new_empty(x.shape) if x is not None and is_needed else dout.new_empty(0)
        for x, is_needed in zip(tokens, needs[:4], strict=True)
    )
    shape = tokens.state_shape if needs[4] else 0
    return q, k, v, g, dout.new_empty(shape, dtype=state_dtype(dout.dtype) if needs[4] else None)


class _Whole(OnceDifferentiable):
    """Autograd over the two ops."""

    of = "linear attention"

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Found:
        out, final, kept = _below_autograd(*args)
        ctx.save_for_backward(*args[:4], *kept)
        ctx.settings = Settings(*args[_TENSORS:])
        ctx.mesh = ctx.settings.on  # is found by name, as long as somebody holds it
        if not ctx.settings.returns:
            ctx.mark_non_differentiable(final)
        return out, final, kept

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor, _: None) -> tuple[Tensor | None, ...]:
        held, given = ctx.saved_tensors, ctx.settings
        tokens, kept, needs = held[:4], held[4:], ctx.needs_input_grad[:_TENSORS]
        told = dfinal if given.returns else None
        with torch.no_grad():
            op = _overload("linear_attention_gradients", given)
            found = op(dout, told, kept, *tokens, *given)
        gradients = [x if is_needed else None for x, is_needed in zip(found, needs, strict=True)]
        none = (None,) * len(given)
        return *without_second_derivative(gradients, (dout, told, *held), _Whole.of), *none


def _below_autograd(*args: Any) -> Found:
    given = Settings(*args[_TENSORS:])
    once = nullcontext() if given.mesh is None else saved_in_graph()
    with once, torch._C._AutoDispatchBelowAutograd():
        return cast(Found, _overload("linear_attention", given)(*args))


def _differentiable(*args: Any) -> Found:
    tensors = [x for x in args[:_TENSORS] if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return cast(Found, _Whole.apply(*args))
    return _below_autograd(*args)


_OF_TOKENS = "Tensor q, Tensor k, Tensor v, Tensor? g"
_OPS: dict[str, tuple[str, Any, Any]] = {
    "linear_attention": (
        f"({_OF_TOKENS}, Tensor initial, {SETTINGS}) -> (Tensor, Tensor, Tensor[])",
        _forward,
        _fake_forward,
    ),
    "linear_attention_gradients": (
        f"(Tensor dout, Tensor? dfinal, Tensor[] kept, {_OF_TOKENS}, {SETTINGS}) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)",
        _gradients,
        _fake_gradients,
    ),
}
for _op, (_schema, _kernel, _fake) in _OPS.items():
    for _name in (_op, f"{_op}.mesh"):
        _LIBRARY.define(f"{_name}{_schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"usp::{_name}", _fake, lib=_LIBRARY)
    has_effect(getattr(torch.ops.usp, _op).mesh)
for _name in ("linear_attention", "linear_attention.mesh"):
    _LIBRARY.impl(_name, _differentiable, "Autograd")
