"""What travels as one message: where each tensor lies in it. ``ops/pack.py`` copies them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from usp.distributed.comm import Axis
from usp.ops.pack import pack, read


@dataclass(frozen=True)
class Parcel:
    """Shapes and dtypes of the tensors that travel as one message."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Parcel:
        return cls(tuple(tuple(t.shape) for t in tensors), tuple(t.dtype for t in tensors))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each tensor."""
        return tuple(
            prod(shape) * dtype.itemsize
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        )

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)

    def read(self, message: Tensor) -> list[Tensor]:
        """The tensors in a message: views, and copies of what does not lie at its alignment."""
        items = zip(message.split(self.sizes), self.shapes, self.dtypes, strict=True)
        return [read(part, shape, dtype) for part, shape, dtype in items]


def sent(
    axis: Axis,
    messages: Mapping[int, Sequence[Tensor]],
    parcels: Mapping[int, Parcel],
    device: torch.device,
) -> dict[int, list[Tensor]]:
    """Some tensors to some ranks, and others from others.

    Args:
        messages: Of each rank that gets some.
        parcels: What comes, of each rank that sends some.
    """
    send = [(rank - axis.rank, pack(list(tensors))) for rank, tensors in messages.items()]
    came = {
        rank: torch.empty(parcel.nbytes, dtype=torch.uint8, device=device)
        for rank, parcel in parcels.items()
    }
    axis.exchange(send, [(rank - axis.rank, message) for rank, message in came.items()])()
    return {rank: parcels[rank].read(message) for rank, message in came.items()}
