"""A library's kernel as a backend: partial results forward, the global ``(out, lse)`` backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from usp.backends.library.call import Kernel
from usp.backends.library.handing import Call
from usp.backends.library.record import Record
from usp.backends.library.tiles import groups
from usp.ops.delta import row_products
from usp.planning.heads import Heads
from usp.planning.problem import Block, Gradients, Saved, Traits

Found = tuple[Record, Kernel]


class LibraryBackend:
    """One name of the table.

    Args:
        records: Its rows; the first that is there counts.
    """

    CARRIES_STATE = False
    OVERWRITES = True
    # whose versions matter to what was found out about any of them
    PACKAGES = ("aiter", "amd-aiter", "flash-attn", "flash-attn-3", "flash-attn-4", "triton")

    def __init__(self, records: tuple[Record, ...]) -> None:
        self.NAME = records[0].name
        self.records = records
        self._found: Found | str | None = None

    def unavailable(self) -> str | None:
        found = self.found()
        return found if isinstance(found, str) else None

    def found(self) -> Found | str:
        """The row that counts here with its kernel, or why none does; asked once."""
        if self._found is None:
            self._found = self._search()
        return self._found

    def forget(self) -> None:
        """Ask again."""
        self._found = None

    def _search(self) -> Found | str:
        reasons = []
        for record in self.records:
            reason = record.missing() or _no_device(record) or record.not_for_this_torch()
            if reason is None:
                try:
                    return record, record.load()
                except Exception as error:  # an import of others may fail in any way
                    said = str(error).strip() or type(error).__name__
                    reason = f"{record.title}: {said}"
            if reason not in reasons:
                reasons.append(reason)
        return "; ".join(reasons)

    def reasons_against(self, traits: Traits) -> tuple[str, ...]:
        device_type = self.records[0].device_type
        if traits.device_type != device_type:
            where = "a GPU" if device_type == "cuda" else device_type
            return (f"its kernels run on {where}, the tensors are on {traits.device_type}",)
        found = self.found()
        if isinstance(found, str):
            return (found,)
        return tuple(found[0].reasons_against(traits))

    def attention_partials(self, block: Block) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows that share a call, with what they see of its keys."""
        record, kernel = self._there()
        keys = _Keys.of(block, record)
        for call in _calls(block, record):
            with _on(block.q):
                out, lse = kernel.forward(
                    call.rows.given(block.q),
                    call.keys.given(keys.k),
                    call.keys.given(keys.v),
                    call.how,
                )
            rows = call.group.rows
            out, lse = call.rows.taken(out), call.taken_lse(lse)
            yield rows.around, rows.spread(out, 1, 0.0), rows.spread(lse, 2, -torch.inf)

    def attention_backward(self, block: Block, saved: Saved, grads: Gradients) -> None:
        calls = list(_calls(block, self._there()[0]))
        places = [grads.dq, grads.dk, grads.dv]
        parts = self._gradients(calls, block, saved)
        if grads.overwrite and len(calls) == 1 and calls[0].is_all_of(block):
            (sums,) = parts  # nothing to add up: rounded once, by the kernel
        else:
            # in the dtype of the state: in 16 bits the error would grow with the ring
            dtype = saved.lse.dtype
            sums = [torch.zeros_like(x, dtype=dtype) for x in places] if grads.overwrite else places
            for call, found in zip(calls, parts, strict=True):
                sides = call.group.rows, call.group.keys, call.group.keys
                for total, part, side in zip(sums, found, sides, strict=True):
                    side.add(total, part, 1)
        if grads.overwrite:
            for place, total in zip(places, sums, strict=True):
                place.copy_(total)

    def _gradients(self, calls: list[Call], block: Block, saved: Saved) -> Iterator[list[Tensor]]:
        """dq, dk, dv of each call's own rows and keys, with heads as in the block."""
        record, kernel = self._there()
        keys, dlse = _Keys.of(block, record), _dlse(saved)
        for call in calls:
            with _on(block.q):
                dq, dk, dv = kernel.backward(
                    # some read dout by the strides of out
                    call.rows.given(saved.dout.to(block.q.dtype)).contiguous(),
                    call.rows.given(block.q),
                    call.keys.given(keys.k),
                    call.keys.given(keys.v),
                    call.rows.given(saved.out.to(block.q.dtype)).contiguous(),
                    call.given_lse(saved.lse),
                    call.how,
                    None if dlse is None else call.given_lse(dlse),
                )
            of_keys = (keys.folded(call.keys.taken(x), saved.lse.dtype) for x in (dk, dv))
            yield [call.rows.taken(dq), *of_keys]

    def _there(self) -> Found:
        found = self.found()
        if isinstance(found, str):
            raise NotImplementedError(f"{self.NAME}: {found}")
        return found


@dataclass(frozen=True, eq=False)
class _Keys:
    """k and v with heads as a kernel wants them.

    Attributes:
        group: Query heads that each head of the block was repeated for, where that is one number.
        index: Else for each of these heads the head of the block that it is; None for its own.
        num_heads: Of the block.
    """

    k: Tensor
    v: Tensor
    num_heads: int
    group: int = 1
    index: Tensor | None = None

    @classmethod
    def of(cls, block: Block, record: Record) -> _Keys:
        num_heads, even = block.k.shape[2], _even_groups(block.heads)
        group = block.q.shape[2] // max(1, num_heads)
        if block.q.shape[2] == num_heads or (even and record.shared_heads):
            return cls(block.k, block.v, num_heads)
        if even:
            spread = (-1, -1, -1, group, -1)
            k, v = (x.unsqueeze(3).expand(spread).flatten(2, 3) for x in (block.k, block.v))
            return cls(k, v, num_heads, group)
        index = _index(block.heads.kv_index, block.k.device)
        k, v = (x.index_select(2, index) for x in (block.k, block.v))
        return cls(k, v, num_heads, index=index)

    def folded(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, n, heads, D) summed in ``dtype`` over query heads that share a head of the block."""
        if self.group > 1:
            return gradient.unflatten(2, (self.num_heads, self.group)).sum(3, dtype=dtype)
        if self.index is None:
            return gradient
        shape = *gradient.shape[:2], self.num_heads, gradient.shape[3]
        total = gradient.new_zeros(shape, dtype=dtype)
        return total.index_add_(2, self.index, gradient.to(dtype))


@lru_cache(maxsize=64)
def _index(kv_index: tuple[int, ...], device: torch.device) -> Tensor:
    """On the device: copied there once, for that is waited for."""
    return torch.tensor(kv_index, device=device, dtype=torch.int64)


def _even_groups(heads: Heads) -> bool:
    """Whether as many query heads share each key head here, as kernels count them."""
    index, (first, stop) = heads.kv_index, heads.kv_range
    size, rest = divmod(heads.count, max(1, stop - first))
    return not rest and index == tuple(h // size for h in range(heads.count))


def _calls(block: Block, record: Record) -> Iterator[Call]:
    if not block.q.numel():
        return
    lies = record.packed
    for group in groups(block.visit, windows=record.windows, packed=lies is not None):
        yield Call(group, block.q.shape[0], block.scoring, block.q.device, lies)


def _dlse(saved: Saved) -> Tensor | None:
    """(B, H, Lq): the gradient of the returned lse, which ``delta`` holds, where there is one."""
    if not saved.lse_has_gradient:
        return None
    return row_products(saved.dout, saved.out, saved.delta.dtype) - saved.delta


def _no_device(record: Record) -> str | None:
    if record.device_type == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device: in here that of the tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
