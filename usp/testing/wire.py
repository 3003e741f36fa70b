"""Counts the bytes that cross ranks, by listening to the ``c10d`` operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from usp.testing.inside import OPAQUE, call_inside


class WireBytes(TorchDispatchMode):
    """Counts the bytes that this rank sends to other ranks through ``torch.distributed``.

    What a rank keeps for itself (its own piece of an all-to-all) does not count. A collective
    counts as its direct algorithm: an all-gather sends a rank's piece to each other rank, a
    reduce-scatter sends each other rank its piece, an all-reduce is one after the other. An
    operation this class does not know raises, so that nothing crosses uncounted.

    Attributes:
        sent: Bytes sent so far.
        calls: How often each ``c10d`` operation was called.

    Example:
        >>> with WireBytes() as wire:
        ...     out = attention(q, k, v)
        >>> wire.sent
    """

    only_listens = True  # usp's collectives are out of sight of modes that do more

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            self.calls[name] += 1
            if name not in _SILENT:
                self.sent += _SENT[name](*args)
        elif namespace == "_c10d_functional" and name != "wait_tensor":
            raise NotImplementedError(f"WireBytes cannot count {func}: it counts c10d:: operations")
        if func._schema.name in OPAQUE:
            return call_inside(self, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _size(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_size(tensor) for tensor in tensors)


def _group(boxed: Any) -> Any:
    return torch.distributed.ProcessGroup.unbox(boxed)


def _send(tensors: Any, group: Any, destination: int, *_: Any) -> int:
    return _size(tensors) if destination != _group(group).rank() else 0


def _all_to_all_single(
    _output: Tensor,
    source: Tensor,
    group: Any,
    _into: Sequence[int],
    splits: Sequence[int],
    *_: Any,
) -> int:
    group = _group(group)
    rows = source.shape[0] if source.dim() else 1
    own = splits[group.rank()] if splits else rows // group.size()
    return _size(source) // max(rows, 1) * (rows - own)


def _all_to_all(_outputs: Any, sources: Sequence[Tensor], group: Any, *_: Any) -> int:
    return _size(sources) - _size(sources[_group(group).rank()])


def _all_gather(_outputs: Any, sources: Any, group: Any, *_: Any) -> int:
    return _size(sources) * (_group(group).size() - 1)


def _reduce_scatter(_outputs: Any, sources: Any, group: Any, *_: Any) -> int:
    group = _group(group)
    if isinstance(sources, Tensor):
        return _size(sources) // group.size() * (group.size() - 1)
    return sum(_size(pieces) - _size(pieces[group.rank()]) for pieces in sources)


def _reduce_scatter_tensors(_outputs: Any, sources: Sequence[Tensor], group: Any, *_: Any) -> int:
    return sum(_reduce_scatter(None, source, group) for source in sources)


def _all_reduce(tensors: Any, group: Any, *_: Any) -> int:
    size = _group(group).size()
    return 2 * _size(tensors) * (size - 1) // size


def _broadcast(tensors: Any, group: Any, root: int, *_: Any) -> int:
    group = _group(group)
    return _size(tensors) * (group.size() - 1) if group.rank() == root else 0


def _reduce(tensors: Any, group: Any, _op: Any, root: int, *_: Any) -> int:
    return _size(tensors) if _group(group).rank() != root else 0


def _gather(_outputs: Any, sources: Any, group: Any, root: int, *_: Any) -> int:
    return _size(sources) if _group(group).rank() != root else 0


def _scatter(_outputs: Any, sources: Any, group: Any, root: int, *_: Any) -> int:
    rank = _group(group).rank()
    return _size(sources) - _size([pieces[rank] for pieces in sources]) if rank == root else 0


_SILENT = {"recv_", "recv_any_source_", "barrier", "monitored_barrier_", "check_for_nan"}
_SENT: dict[str, Callable[..., int]] = {
    "send": _send,
    "alltoall_base_": _all_to_all_single,
    "alltoall_": _all_to_all,
    "allgather_": _all_gather,
    "allgather_coalesced_": _all_gather,
    "_allgather_base_": _all_gather,
    "allgather_into_tensor_coalesced_": _all_gather,
    "reduce_scatter_": _reduce_scatter,
    "_reduce_scatter_base_": _reduce_scatter,
    "reduce_scatter_tensor_coalesced_": _reduce_scatter_tensors,
    "allreduce_": _all_reduce,
    "allreduce_coalesced_": _all_reduce,
    "broadcast_": _broadcast,
    "reduce_": _reduce,
    "gather_": _gather,
    "scatter_": _scatter,
}
