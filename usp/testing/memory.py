"""Counts the bytes of tensors that live at a time, by listening to what ops return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from usp.testing.inside import OPAQUE, call_inside


class StorageBytes(TorchDispatchMode):
    """Follows the storages that are made while it is entered, on any device.

    Each op is looked at when it returns: what it made and freed inside of itself is not seen, but
    of usp's attention it is, where this is the outermost mode; nor what was there before this was
    entered. Of those storages the numbers are exact, and the same
    on every machine.

    Attributes:
        peak: Most bytes that lived at a time.
        largest: Bytes of the largest single one.

    Example:
        >>> with StorageBytes() as memory:
        ...     model(x).sum().backward()
        >>> memory.peak
    """

    only_listens = True  # usp's collectives are out of sight of modes that do more

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest = 0
        self._before: dict[int, StorageWeakRef] = {}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def live(self) -> int:
        """Bytes that live now."""
        self._made = {key: pair for key, pair in self._made.items() if not pair[0].expired()}
        return sum(size for _, size in self._made.values())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for storage in _storages((args, kwargs)):
            if not self._knows(storage._cdata):
                self._before[storage._cdata] = StorageWeakRef(storage)
        if func._schema.name in OPAQUE and not torch._C._len_torch_dispatch_stack():
            found = call_inside(self, func, args, kwargs or {})
        else:
            found = func(*args, **(kwargs or {}))
        for storage in _storages(found):
            if not self._knows(storage._cdata):
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return found

    def _knows(self, key: int) -> bool:
        reference = self._before.get(key) or self._made.get(key, (None,))[0]
        if reference is not None and reference.expired():  # another one lies there now
            self._before.pop(key, None)
            self._made.pop(key, None)
            return False
        return reference is not None


def _storages(items: Any) -> list[Any]:
    return [x.untyped_storage() for x in tree_leaves(items) if isinstance(x, Tensor)]
