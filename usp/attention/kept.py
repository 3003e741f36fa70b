"""Calls like one that was checked before: a short sequence would wait for Python longer than for
its attention.

What is checked and planned depends on options and on what tensors are, not on what they hold. So
where one device has all, the next call of the same kind takes both from here. The backend alone is
asked again: what it can take may change, by an environment variable say.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from torch import Tensor

from usp.attention.arguments import drops, slopes_of, traits_of
from usp.attention.given import Options, Tensors
from usp.attention.hybrid import Call
from usp.backends import select
from usp.planning.problem import Traits

_MOST = 256
# What has no parts of other types, and is told apart by its own.
_PLAIN = frozenset((bool, int, float, str, type(None)))
_KEPT: OrderedDict[Hashable, tuple[Call, Traits]] = OrderedDict()


def kind_of(tensors: Tensors, options: Options, validate: object) -> Hashable | None:
    """What two calls must share to be checked and planned alike; None where that is not known.

    Values are told apart by their types too: 1 is no True, and 5.0 no 5.
    """
    values = (*vars(options).values(), validate)
    others = [value for value in values if type(value) not in _PLAIN]
    if any(isinstance(value, Tensor) for value in others) or drops(options.dropout_p):
        return None
    try:
        types = tuple(map(type, values)), tuple(map(_types, others))
        kind = values, types, tuple(map(_what, tensors))
        hash(kind)
    except (TypeError, RuntimeError, AttributeError):  # a list; a nested tensor; none at all
        return None
    return kind


def _types(value: object) -> Any:
    """Of a value and of all that tuples in it hold."""
    if not isinstance(value, tuple):
        return type(value)
    if any(isinstance(each, tuple) for each in value):
        return type(value), tuple(_types(each) for each in value)
    return type(value), tuple(map(type, value))


def _what(x: Tensor | None) -> Hashable:
    if x is None:
        return None
    return type(x), x.shape, x.dtype, x.device, x.layout, x.requires_grad, x.is_nested


def kept(kind: Hashable | None, tensors: Tensors, options: Options) -> tuple[Tensors, Call] | None:
    """The call of that kind, with these tensors as it takes them."""
    found = _KEPT.get(kind) if kind is not None else None
    if found is None:
        return None
    call, traits = found
    if select(options.backend, traits) is not call.ring.backend:
        return None
    if tensors.alibi_slopes is not None:
        tensors = tensors._replace(alibi_slopes=slopes_of(tensors))
    return tensors, call


def keep(kind: Hashable | None, tensors: Tensors, options: Options, call: Call) -> None:
    """For the next call of that kind."""
    if kind is None:
        return
    _KEPT[kind] = call, traits_of(tensors, call.request.scoring, options.return_lse)
    while len(_KEPT) > _MOST:
        _KEPT.popitem(last=False)
