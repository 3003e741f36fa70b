"""The states of ranks as two ops, for graphs of ``torch.compile``: all else is plain torch.

On a mesh they have an effect: the other ranks would wait for one that was dropped, or in another
order. Ranks meet where the op runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from usp.distributed.agreement import (
    Facts,
    When,
    check_on_all_ranks,
    check_when,
    meet_before_backward,
    meets,
    new_name,
)
from usp.distributed.graph import has_effect, saved_in_graph
from usp.distributed.mesh import SequenceMesh, mesh_of
from usp.linear_attention.exchange import Chain
from usp.linear_attention.states import begin, gradients_of, scanned
from usp.ops.derivatives import OnceDifferentiable, without_second_derivative

_LIBRARY = torch.library.Library("usp", "FRAGMENT")
SETTINGS = (
    "str method, bool returns, int[] first, int[] documents, bool[] needed, str? mesh, "
    "bool? validate, bool is_first"
)


class Settings(NamedTuple):
    """Of a call, in the words of a schema.

    Attributes:
        method, returns: See ``Chain``.
        first, documents: See ``Request``.
        needed: Which arguments of the call need a gradient.
        mesh: Its name.
        validate, is_first: As of the op of attention.
    """

    method: str
    returns: bool
    first: Sequence[int]
    documents: Sequence[int]
    needed: Sequence[bool]
    mesh: str | None
    validate: bool | None
    is_first: bool

    @property
    def on(self) -> SequenceMesh | None:
        return None if self.mesh is None else mesh_of(self.mesh)

    @property
    def chain(self) -> Chain:
        return Chain.of(self.on, self.method, self.returns)

    def meet(self, shapes: Sequence[object]) -> int:
        """Have the ranks compare what each does here; the name of the call, 0 where they do not."""
        mesh = self.on
        facts: Facts = {"what is done": (*self[:5], *shapes)}
        if mesh is None:
            return 0
        compares = self.validate
        if self.is_first:
            kind = repr(("linear_attention", facts))
            compares = True if kind not in mesh.compared else None
            mesh.compared.add(kind)
        if not meets(mesh, compares, False):
            return 0
        place, number = "linear_attention", (new_name(),)
        _, told = check_on_all_ranks(mesh, place, lambda: None, lambda _: facts, lambda: number)
        return told[0][0]


def settings(
    chain: tuple[str, bool],
    sequence: tuple[Sequence[int], Sequence[int]],
    needed: Sequence[bool],
    mesh: SequenceMesh | None,
    validate: When,
) -> Settings:
    """Of a call; ``validate`` may be "first": at the first of such calls on the mesh."""
    check_when(None if validate == "first" else validate)
    name = None if mesh is None or mesh.size == 1 else mesh.name
    compares = validate if isinstance(validate, bool) else None
    return Settings(*chain, *sequence, needed, name, compares, validate == "first")


def states(
    transitions: Tensor, updates: Tensor, initial: Tensor, given: Settings
) -> tuple[Tensor, Tensor | None]:
    """``states_before`` through the op."""
    found, final, _, _ = torch.ops.usp.linear_states(transitions, updates, initial, *given)
    return found, final if given.returns else None


Found = tuple[Tensor, Tensor, list[Tensor], Tensor]


def _forward(transitions: Tensor, updates: Tensor, initial: Tensor, *args: Any) -> Found:
    given = Settings(*args)
    shapes = (*transitions.shape[1:], *updates.shape[1:], updates.dtype)
    name = given.meet(shapes)
    arrived = begin(transitions, updates, initial, given.chain)()
    with torch.no_grad():
        found = scanned(transitions, updates, arrived.before)
    final = initial.new_empty(0) if arrived.final is None else arrived.final
    of_ranks = [x.contiguous() for x in arrived.transitions]
    # strides as the graph was told
    return found.contiguous(), final.contiguous(), of_ranks, torch.tensor(name, device="cpu")


def _gradients(
    dstates: Tensor,
    dfinal: Tensor | None,
    transitions: Tensor,
    found: Tensor,
    of_ranks: Sequence[Tensor],
    name: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    given = Settings(*args)
    if given.on is not None and name:
        meet_before_backward(given.on, int(name))
    made = gradients_of(dstates, dfinal, transitions, found, tuple(of_ranks), given.chain)
    dtransitions, dupdates, dinitial = (x.contiguous() for x in made)
    return dtransitions, dupdates, dinitial


def _fake_forward(transitions: Tensor, updates: Tensor, initial: Tensor, *args: Any) -> Found:
    given = Settings(*args)
    ranks = len(given.first) - 1 if given.method == "gather" else 1
    final = initial.new_empty(initial.shape if given.returns else 0)
    of_ranks = [transitions.new_empty(transitions.shape[1:]) for _ in range(ranks)]
    name = torch.empty((), dtype=torch.int64, device="cpu")
    return updates.new_empty(updates.shape), final, of_ranks, name


def _fake_gradients(
    dstates: Tensor, _: Tensor | None, transitions: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = dstates.shape
    new = transitions.new_empty(transitions.shape), dstates.new_empty(shape)
    return *new, dstates.new_empty(shape[1:])


class _InGraph(OnceDifferentiable):
    """Autograd over the two ops."""

    of = "linear attention"

    @staticmethod
    def forward(
        ctx: Any, transitions: Tensor, updates: Tensor, initial: Tensor, *args: Any
    ) -> Found:
        found, final, of_ranks, name = _below_autograd(transitions, updates, initial, *args)
        ctx.save_for_backward(transitions, found, name, *of_ranks)
        ctx.settings = Settings(*args)
        ctx.mesh = ctx.settings.on  # is found by name, as long as somebody holds it
        if not ctx.settings.returns:
            ctx.mark_non_differentiable(final)
        return found, final, of_ranks, name

    @staticmethod
    def backward(ctx: Any, dstates: Tensor, dfinal: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        transitions, found, name, *of_ranks = ctx.saved_tensors
        given = ctx.settings
        told = dfinal if given.returns else None
        with torch.no_grad():
            gradients = torch.ops.usp.linear_states_gradients(
                dstates, told, transitions, found, of_ranks, name, *given
            )
        origins = dstates, told, transitions, found
        given_none = (None,) * len(given)
        return *without_second_derivative(gradients, origins, _InGraph.of), *given_none


def _below_autograd(*args: Any) -> Found:
    with saved_in_graph(), torch._C._AutoDispatchBelowAutograd():
        return cast(Found, torch.ops.usp.linear_states(*args))


def _differentiable(*args: Any) -> Found:
    if torch.is_grad_enabled() and any(x.requires_grad for x in args[:3]):
        return cast(Found, _InGraph.apply(*args))
    return _below_autograd(*args)


_TENSORS = "Tensor transitions, Tensor updates, Tensor initial"
_OF_BACKWARD = (
    "Tensor dstates, Tensor? dfinal, Tensor transitions, Tensor states, Tensor[] of_ranks, "
    "Tensor name"
)
for _name, _schema, _kernel, _fake in (
    (
        "linear_states",
        f"({_TENSORS}, {SETTINGS}) -> (Tensor, Tensor, Tensor[], Tensor)",
        _forward,
        _fake_forward,
    ),
    (
        "linear_states_gradients",
        f"({_OF_BACKWARD}, {SETTINGS}) -> (Tensor, Tensor, Tensor)",
        _gradients,
        _fake_gradients,
    ),
):
    _LIBRARY.define(f"{_name}{_schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"usp::{_name}", _fake, lib=_LIBRARY)
    has_effect(getattr(torch.ops.usp, _name).default)
_LIBRARY.impl("linear_states", _differentiable, "Autograd")
