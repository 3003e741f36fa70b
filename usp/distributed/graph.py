"""What a graph of ``torch.compile`` may do with an op that communicates: run it once, in its place.

Ranks make their graphs each by itself. Were an op dropped, repeated or moved in front of another on
one of them, the others would wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
from torch.utils.checkpoint import CheckpointPolicy


def has_effect(op: torch._ops.OpOverload) -> None:
    """Keep graphs from dropping the op, and all that have an effect in the order of the program."""
    _register_effectful_op(op, _EffectType.ORDERED)


@contextmanager
def saved_in_graph() -> Iterator[None]:
    """What is traced in here is saved by a checkpoint around it, whatever its policy."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    if mode is None:
        yield
        return
    nodes = mode.tracer.graph.nodes
    before = len(nodes)
    yield
    for node in islice(reversed(nodes), len(nodes) - before):
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
