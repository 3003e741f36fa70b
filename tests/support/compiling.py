"""Graphs of ``torch.compile``, made afresh and counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def afresh() -> Iterator[None]:
    """Nothing that was compiled before counts in here.

    Also on the disk: traces there are found by names of ops, not by what their fakes return.
    """
    import torch._functorch.config

    torch._dynamo.reset()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield


class Counting:
    """A compiler that counts graphs with work in them.

    Args:
        backend: What makes something of them; None runs them as they are.
    """

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        # what dynamo notes of a tensor's attributes makes a graph without work: none is split
        calls = [n for n in graph.graph.nodes if n.op in ("call_function", "call_method")]
        self.graphs += any(n.target is not getattr for n in calls)
        if self.backend is None:
            return graph.forward
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)
