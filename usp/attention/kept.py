"""Calls like one that was checked before: a short sequence would wait for Python longer than for
its attention.

What is checked and planned depends on options and on what tensors are, not on what they hold. So
where one device has all, the next call of the same kind takes both from here. The backend alone is
asked again: what it can take may change, by an environment variable say.
"""

from __future__ import annotations

import marshal
import pickle
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from torch import Tensor

from usp.attention.arguments import drops, slopes_of, traits_of
from usp.attention.given import Options, Tensors
from usp.attention.hybrid import Call
from usp.backends import Selected

_MOST, _MOST_TOLD = 256, 32
_DEFAULTS = vars(Options())
_KEPT: OrderedDict[Hashable, tuple[Call, Selected]] = OrderedDict()
# by the names and identities of options: these, for they stay who they are, and what they say
_TOLD: OrderedDict[Hashable, tuple[tuple[Any, ...], Hashable]] = OrderedDict()


def kind_of(tensors: Tensors, told: dict[str, Any], validate: object) -> Hashable | None:
    """What two calls must share to be checked and planned alike; None where that is not known.

    Masks and layouts compare by value. All else is told apart by its types too, at any depth: 1 is
    no True, and 5.0 no 5.

    Args:
        told: Options by name.
    """
    values = *told.values(), validate
    # A model tells the same objects again and again. What they hold is not read then: behind the
    # data of a kernel all that a call reads comes from memory anew.
    identity = *told, *map(id, values)
    seen = _TOLD.get(identity)
    said = _said(told, validate) if seen is None else seen[1]
    if said is None:
        return None
    try:
        kind = said, *map(_what, tensors)
    except (RuntimeError, AttributeError):  # a nested tensor; none at all
        return None
    if seen is None and _is_hashable(values):  # what can change is read each time
        _TOLD[identity] = values, said
        _forget_oldest(_TOLD, _MOST_TOLD)
    return kind


def _said(told: dict[str, Any], validate: object) -> Hashable | None:
    given = _DEFAULTS | told
    layout, mask = given.pop("layout"), given.pop("mask")
    values = *given.values(), validate
    try:
        marshal.dumps(values, 2)  # raises for tensors and for what is no number, word or list
        said = pickle.dumps(values), mask, layout
        hash(said)
    except (ValueError, TypeError, RuntimeError, AttributeError):
        return None
    return None if drops(given["dropout_p"]) else said


def _is_hashable(x: object) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


def _what(x: Tensor | None) -> Hashable:
    if x is None:
        return None
    return type(x), x.shape, x.dtype, x.device, x.layout, x.requires_grad


def kept(kind: Hashable | None, tensors: Tensors) -> tuple[Tensors, Call] | None:
    """The call of that kind, with these tensors as it takes them."""
    found = _KEPT.get(kind) if kind is not None else None
    if found is None:
        return None
    call, selected = found
    if not selected.holds():
        return None
    if tensors.alibi_slopes is not None:
        tensors = tensors._replace(alibi_slopes=slopes_of(tensors))
    return tensors, call


def keep(kind: Hashable | None, tensors: Tensors, options: Options, call: Call) -> None:
    """For the next call of that kind."""
    if kind is None:
        return
    traits = traits_of(tensors, call.request.scoring, options.return_lse)
    _KEPT[kind] = call, Selected.now(call.ring.backend, traits)
    _forget_oldest(_KEPT, _MOST)


def _forget_oldest(table: OrderedDict[Any, Any], most: int) -> None:
    while len(table) > most:
        table.popitem(last=False)
