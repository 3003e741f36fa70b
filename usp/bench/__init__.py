"""``usp bench``: programs that measure, each a module with ``main(argv) -> exit code``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

# By name, with what is said of each in a list.
PROGRAMS: dict[str, str] = {
    "kernels": "attention forward and backward, ring step, head exchange, merge, on one device",
    "ring": "whole distributed attention on any mesh, beside others in the same processes",
    "comm": "each link between processes and each collective: bytes a second, cost of a message",
    "documents": "documents of many lengths: a degree for each, beside one mesh for all",
    "chunks": "attention in chunks of tokens and of heads: peak memory and time, beside at once",
    "memory": "peak bytes of a rank in a step and in attention alone, against the formula",
    "model": "a step of training of a ViT and of a language model, whole and sharded",
    "scaling": "strong and weak scaling of a step over data ranks and ranks of a sequence",
    "compare": "two files of results: what became faster or slower, beyond noise",
    "table": "a Markdown table of a file of results",
    "plot": "a picture of a file of results",
}


def run(name: str, argv: Sequence[str]) -> int:
    """Run a program.

    Args:
        name: One of ``PROGRAMS``.
        argv: Its arguments.

    Returns:
        The exit code: 0, or 1 where a result of usp was wrong.

    Raises:
        SystemExit: the arguments are none (2), or help was asked for (0).
    """
    found: int = importlib.import_module(f"usp.bench.{name}").main(argv)
    return found
