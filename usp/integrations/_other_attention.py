"""Attention that is no ``nn.MultiheadAttention``, guessed from what the code of a module names.

On a mesh it would see this rank's own tokens alone and say nothing. A guess, either way: code that
lies in an extension or behind a table of functions is not seen, and two products with a softmax
may be something else. So it only ever leads to a question (``replace_attention(only=)``).
"""

from __future__ import annotations

import dis
import inspect
import re
from collections.abc import Iterator
from types import CodeType, FunctionType

from torch import nn

from usp.nn.long_context import LongContextAttention

# what attention is called through in the libraries of the field
CALLS = frozenset(
    (
        "scaled_dot_product_attention",
        "multi_head_attention_forward",
        "flex_attention",
        "flash_attn_func",
        "flash_attn_qkvpacked_func",
        "flash_attn_varlen_func",
        "memory_efficient_attention",
        "dispatch_attention_fn",
        "ALL_ATTENTION_FUNCTIONS",
        "eager_attention_forward",
    )
)
PRODUCTS = frozenset(("matmul", "bmm", "baddbmm", "einsum", "@"))
OURS = "long_context_attention"
_NAMED_LIKE_ONE = re.compile(r"attention|attn", re.IGNORECASE)
_LIBRARIES = ("torch", "usp", "einops", "numpy")


def other_attention(model: nn.Module) -> dict[str, str]:
    """Why each module of ``model`` is taken for attention that nobody spreads, by name.

    Modules named like attention count where none that they hold is attention itself.
    """
    reasons: dict[str, str] = {}
    named: dict[str, str] = {}
    known: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention | LongContextAttention):
            known.append(name)
        elif words := list(_words(module)):
            if OURS in words:
                known.append(name)
            elif reason := _reason(module, words):
                reasons[name] = reason
            elif _NAMED_LIKE_ONE.search(type(module).__name__):
                named[name] = "is named like it"
    for name in named:
        if not any(_is_within(other, name) for other in (*known, *reasons, *named)):
            reasons[name] = named[name]
    return reasons


def _reason(module: nn.Module, words: list[str]) -> str | None:
    for word in words:
        if word in CALLS:
            return f"calls {word}"
    softmax = "softmax" in words or any(isinstance(m, nn.Softmax) for m in module.children())
    if softmax and sum(word in PRODUCTS for word in words) >= 2:
        return "has a softmax and products of matrices"
    return None


def _is_within(name: str, whole: str) -> bool:
    return name != whole and (not whole or name.startswith(whole + "."))


def _words(module: nn.Module) -> Iterator[str]:
    """The names in ``forward`` and in the functions and methods that it calls, and "@".

    None where ``forward`` is a library's that we know.
    """
    waiting, seen = [_function(module.forward)], set()
    while waiting:
        function = waiting.pop()
        if function is None or function in seen or _is_of_library(function):
            continue
        seen.add(function)
        for word in _words_of(function.__code__):
            yield word
            for found in (function.__globals__.get(word), getattr(type(module), word, None)):
                if (alias := getattr(found, "__name__", word)) != word:
                    yield alias
                waiting.append(_function(found))


def _function(item: object) -> FunctionType | None:
    """The function behind methods and decorators that say what they wrap."""
    item = getattr(item, "__func__", item)
    item = inspect.unwrap(item) if callable(item) else item
    return item if isinstance(item, FunctionType) else None


def _is_of_library(function: FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] in _LIBRARIES


def _words_of(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if isinstance(instruction.argval, CodeType):
            yield from _words_of(instruction.argval)
        elif instruction.opname == "BINARY_MATRIX_MULTIPLY" or (
            instruction.opname == "BINARY_OP" and instruction.argrepr == "@"
        ):
            yield "@"
        elif instruction.opcode in dis.hasname:
            yield str(instruction.argval)
