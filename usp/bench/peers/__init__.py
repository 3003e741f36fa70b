"""Whole distributed attention by others, to run in the same processes as usp's.

A peer is a module here with

- ``NAME``, and ``unavailable()``: why it cannot run on this machine, or None;
- ``reason_against(case, size)``: why it cannot take a case over so many ranks, or None;
- ``positions(case, rank, size)``: (L,) int64, which tokens a rank holds;
- ``make(case)``: a function of q, k, v (B, L, H, D) of this rank that returns out, differentiable;
  called on every rank, whose process group is that of all.

What it imports of another library it imports inside of these functions.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any

# In the order in which they are shown.
PEERS = ("plain", "ringmaster", "lucidrains", "deepspeed")


def peer(name: str) -> Any:
    """The module of a peer."""
    return importlib.import_module(f"usp.bench.peers.{name}")


def missing(package: str, *modules: str) -> str | None:
    """Why modules of a package cannot be imported, or None."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # an import may fail in any way
            return f"{type(error).__name__}: {error} (pip install {package})"
    return None


def present(names: Iterable[str]) -> tuple[list[Any], dict[str, str]]:
    """Those that can run here, and why others cannot."""
    found, reasons = [], {}
    for module in map(peer, names):
        why = module.unavailable()
        if why is None:
            found.append(module)
        else:
            reasons[module.NAME] = why
    return found, reasons
