"""A mask from text, written as masks print themselves; nothing but masks can be said in it."""

from __future__ import annotations

import ast
from typing import Any

from usp import masks
from usp.masks import Mask

# made of tensors and functions, which no text holds
_UNTOLD = {"Mask", "from_dense", "from_function"}
NAMES = tuple(name for name in masks.__all__ if name not in _UNTOLD)
_LANGUAGE = f"calls of {', '.join(NAMES)} with literal arguments, and & | ~ ( )"


def parse_mask(text: str) -> Mask:
    """``causal() & (window(512, 512) | first_keys(4))`` as that mask.

    Raises:
        ValueError: names what is not known, or says what a mask refuses of its arguments.
    """
    try:
        return _mask(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r} is no mask ({error}): write {_LANGUAGE}") from error


def _mask(node: ast.expr) -> Mask:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        return _mask(node.left) & _mask(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _mask(node.left) | _mask(node.right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_mask(node.operand)
    if not isinstance(node, ast.Call):
        raise ValueError(f"{ast.unparse(node)!r} is no mask: write {_LANGUAGE}")
    if not isinstance(node.func, ast.Name) or node.func.id not in NAMES:
        raise ValueError(f"unknown mask {ast.unparse(node.func)!r}: write {_LANGUAGE}")
    return _called(node, node.func.id)


def _called(node: ast.Call, name: str) -> Mask:
    given = [_argument(argument) for argument in node.args]
    named: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError(f"{ast.unparse(node)!r}: arguments are literals, not **")
        named[keyword.arg] = _argument(keyword.value)
    try:
        made = getattr(masks, name)(*given, **named)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{ast.unparse(node)!r}: {error}") from error
    assert isinstance(made, Mask)
    return made


def _argument(node: ast.expr) -> Any:
    """A literal, or a mask where a mask takes one."""
    if isinstance(node, ast.Call):
        return _mask(node)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return _mask(node)
