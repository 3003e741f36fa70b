"""The head exchange on one device: all a rank does but sending, against the device's own copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from usp import kernels
from usp.attention import ulysses
from usp.distributed.comm import Axis
from usp.ops import native as ops

Run = Callable[[], list[Tensor]]


class Row(Axis):
    """Ranks that all hold the same: what one sends to the others is what comes in."""

    def all_to_all(self, messages: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        assert list(send) == list(recv)
        return messages


class HeadExchange:
    """q, k, v (1, L, H, D) of one of ``degree`` ranks, each of which gets H / degree heads."""

    def __init__(self, degree: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.row, self.tensors = Row(degree, 0, None), [q, k, v]
        _, length, heads, _ = q.shape
        each = heads // degree
        runs = tuple((rank * each, (rank + 1) * each) for rank in range(degree))
        self.cut = ulysses.Cut((length,) * degree, runs)
        self.gathered = self.expected("scatter")
        size = self.bytes_moved // 2
        self.source, self.target = (
            torch.ones(size, dtype=torch.uint8, device=q.device) for _ in "12"
        )

    @property
    def bytes_moved(self) -> int:
        """Read and written, into a message and out of it."""
        return 4 * sum(x.numel() * x.element_size() for x in self.tensors)

    def expected(self, which: str) -> list[Tensor]:
        """Where all ranks hold the same."""
        if which == "gather":
            return self.tensors
        return [
            torch.cat([x[:, :, slice(*run)] for run in self.cut.heads], 1) for x in self.tensors
        ]

    def copy(self) -> Tensor:
        """As many bytes read and written as an exchange must."""
        return self.target.copy_(self.source)

    def scatter(self) -> list[Tensor]:
        return ulysses.scatter_heads(self.row, self.tensors, [self.cut] * 3)

    def gather(self) -> list[Tensor]:
        return ulysses.gather_heads(self.row, self.gathered, [self.cut] * 3)

    def torch_scatter(self) -> list[Tensor]:
        """By torch alone: pieces made contiguous, joined to a message, cut and joined again."""
        pieces = [[x[:, :, slice(*run)] for x in self.tensors] for run in self.cut.heads]
        message = torch.cat([x.contiguous().flatten() for piece in pieces for x in piece])
        parts = message.split([x.numel() for piece in pieces for x in piece])
        return [
            torch.cat([p.view(x[n].shape) for p, x in zip(parts[n::3], pieces, strict=True)], 1)
            for n in range(3)
        ]

    def torch_gather(self) -> list[Tensor]:
        split = [x.split(self.cut.lengths, 1) for x in self.gathered]
        pieces = list(zip(*split, strict=True))
        message = torch.cat([x.contiguous().flatten() for piece in pieces for x in piece])
        parts = message.split([x.numel() for piece in pieces for x in piece])
        return [
            torch.cat([p.view(x[n].shape) for p, x in zip(parts[n::3], pieces, strict=True)], 2)
            for n in range(3)
        ]

    def runs(self, which: str) -> dict[str, Run]:
        """Every way that is here."""
        ours: Run = self.scatter if which == "scatter" else self.gather
        found = {"torch": self.torch_scatter if which == "scatter" else self.torch_gather}
        device = self.tensors[0].device.type
        if kernels.reason_against(device) is None:
            found["usp triton"] = ours
        if ops.is_there("pack", device):

            def native() -> list[Tensor]:
                with without_triton():
                    return ours()

            found["usp native"] = native
        return found


@contextmanager
def without_triton() -> Iterator[None]:
    with mock.patch.object(kernels, "can_take", lambda *tensors: False):
        yield
