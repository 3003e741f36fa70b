"""Families of kernels for tests: right ones, and such as are wrong on purpose.

Each is a module in a folder of the path, so that another process finds it too. All compute what the
reference does, and then spoil it.
"""

from __future__ import annotations

import importlib
import sys
import textwrap
from pathlib import Path
from types import ModuleType

_TEMPLATE = """
import os, sys, time
from dataclasses import replace

import torch

from usp.backends import reference
from usp.planning.visit import whole_visit

NAME = {name!r}
CARRIES_STATE = False
OVERWRITES = False


def unavailable():
    return None


def reasons_against(traits):
    return ("it has no softcap",) if traits.softcap else ()


def seen(block):
    return block


def spoil(out, lse):
    return out, lse


def spoil_gradients(grads):
    pass


def attention_partials(block):
    for rows, out, lse in reference.attention_partials(seen(block)):
        yield rows, *spoil(out, lse)


def attention_backward(block, saved, grads):
    reference.attention_backward(seen(block), saved, grads)
    spoil_gradients(grads)


{changes}
"""

# What is done to each, and a word of what is seen of it.
WRONG: dict[str, tuple[str, str]] = {
    "wrong_out": ("def spoil(out, lse): return out * 1.1, lse", "out is off by"),
    "wrong_lse": ("def spoil(out, lse): return out, lse + 0.2", "lse is off by"),
    "nan": ("def spoil(out, lse): return out * float('nan'), lse", "out is off by nan"),
    "wrong_dq": ("def spoil_gradients(grads): grads.dq.mul_(1.2)", "dq is off by"),
    "wrong_dk": ("def spoil_gradients(grads): grads.dk.mul_(1.2)", "dk of block"),
    "wrong_dv": ("def spoil_gradients(grads): grads.dv.mul_(1.2)", "dv of block"),
    "forgets_dq": ("def spoil_gradients(grads): grads.dq.zero_()", "dq is off by"),
    "blind_to_windows": (
        """
        def seen(block):
            span = block.visit.span
            if span is None or not bool(span.first.max() > 0):
                return block
            wider = type(span)(torch.zeros_like(span.first), span.stop)
            return block._replace(visit=replace(block.visit, span=wider))
        """,
        "(a window)",
    ),
    "top_left_causal": (
        """
        def seen(block):
            span, visit = block.visit.span, block.visit
            if span is None or not visit.num_keys > visit.num_queries or span.first.max() > 0:
                return block
            i = torch.arange(visit.num_queries, dtype=torch.int32)
            moved = type(span)(span.first, torch.minimum(i + 1, span.stop))
            return block._replace(visit=replace(visit, span=moved))
        """,
        "(causal, fewer queries than keys)",
    ),
    "raises": (
        "def seen(block): raise RuntimeError('no kernel image is available')",
        "it raised RuntimeError: no kernel image",
    ),
}
# Such as take their process with them.
FATAL = {
    "dies": ("def seen(block): os.abort()", "exit code -6"),
    "hangs": ("def seen(block): time.sleep(600)", "still running after 12 s"),
    "leaves": ("def seen(block): sys.exit('bad kernel')", "exit code 1: bad kernel"),
}
# Has other kernels for some calls, which "{}" spoils.
WITH_VARIANT = """
from contextlib import contextmanager

in_use = set()
forced = [False]


def variant(traits):
    return "other" if traits.dtype != torch.float64 else None


@contextmanager
def only_variant():
    forced[0] = True
    try:
        yield
    finally:
        forced[0] = False


def use_variant(traits):
    in_use.add((traits.device, traits.dtype, traits.head_dim))


def spoil(out, lse):
    return ({}) if forced[0] else (out, lse)
"""
# Right for one dtype alone.
NOT_FP32 = """
def seen(block):
    if block.q.dtype == torch.float32:
        raise RuntimeError("float32 does not compile")
    return block
"""


def write(folder: Path, name: str, changes: str = "") -> str:
    """A family of that name, as a module of a folder; its module's name."""
    text = _TEMPLATE.format(name=name, changes=textwrap.dedent(changes))
    module = f"family_{name}"
    (folder / f"{module}.py").write_text(text)
    return module


def make(folder: Path, name: str, changes: str = "") -> ModuleType:
    """The same with the module itself; the folder is one of ``sys.path``."""
    module = write(folder, name, changes)
    importlib.invalidate_caches()
    sys.modules.pop(module, None)
    return importlib.import_module(module)
