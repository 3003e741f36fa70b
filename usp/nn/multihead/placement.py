"""Where the tokens of an attention module live, and by which way they meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from usp.attention.chunk_options import refuse_chunks
from usp.attention.given import Options
from usp.backends import check_name
from usp.distributed.agreement import check_validate
from usp.distributed.mesh import SequenceMesh, check_mesh, degrees_and_place
from usp.distributed.transport import check_transport
from usp.planning.layout import Layout, Layouts, both
from usp.planning.masks.mask import Mask
from usp.planning.masks.options import make_mask
from usp.planning.shares import named_lengths, shares, summed_length
from usp.sharding.sequence import unshard_sequence


@dataclass(frozen=True)
class Placement:
    """The options that ``MultiheadAttention`` has beyond torch's; see there."""

    mesh: SequenceMesh | None = None
    layout: Layouts = "contiguous"
    seq_len: int | tuple[int, int] | str | None = None
    transport: str = "auto"
    backend: str = "auto"
    validate: str = "first"
    causal: bool = False
    window_size: tuple[int | None, int | None] = (None, None)
    heads: tuple[int, int] | None = None
    mask: Mask | None = None
    chunks: int = 1
    head_chunks: int = 1
    offload: str | None = None

    def __post_init__(self) -> None:
        check_mesh(self.mesh)
        both(self.layout)
        check_name(self.backend)
        check_transport(self.transport)
        check_validate(self.validate)
        if isinstance(self.seq_len, str) and self.seq_len != "infer":
            raise ValueError(
                f"seq_len must be a number, a pair of numbers, None or 'infer', "
                f"got {self.seq_len!r}"
            )
        _ = self.named_lengths  # refuses what is no length
        if self.mask is not None and not isinstance(self.mask, Mask):
            raise TypeError(
                f"mask must be a mask of usp.masks, the same for all samples, got {self.mask!r}: "
                "a tensor is an attn_mask of the call"
            )
        self.whole_mask(False)
        refuse_chunks(Options(**self.told))

    @cached_property
    def told(self) -> dict[str, Any]:
        """The options of ``long_context_attention`` by name, but for what a call says."""
        return {
            "causal": self.causal,
            "window_size": self.window_size,
            "mask": self.mask,
            "layout": self.layout,
            "transport": self.transport,
            "backend": self.backend,
            "heads": self.heads,
            "chunks": self.chunks,
            "head_chunks": self.head_chunks,
            "offload": self.offload,
        }

    @property
    def _degrees(self) -> tuple[int, int]:
        """Of the ring and of Ulysses."""
        return degrees_and_place(self.mesh)[0]

    @property
    def layouts(self) -> tuple[Layout, Layout]:
        """Of queries and of keys."""
        return both(self.layout)

    @property
    def size(self) -> int:
        """Ranks that share the sequence."""
        return 1 if self.mesh is None else self.mesh.size

    def whole_mask(self, causal: bool) -> Mask:
        """The mask of a call that is ``causal`` on top of the options."""
        options = make_mask(causal=self.causal or causal, window_size=self.window_size)
        return options if self.mask is None else options & self.mask

    @cached_property
    def named_lengths(self) -> tuple[int, int] | None:
        """Queries and keys of the whole sequence where ``seq_len`` or the layout say them."""
        return named_lengths(self.seq_len, self.layout)

    def summed_lengths(self, held: Sequence[tuple[int, ...]]) -> tuple[int, int]:
        """The same as the sum of the (queries, keys, ...) that each rank holds.

        Raises:
            ValueError: the layout gives a rank another share; the same on all ranks.
        """
        queries, keys, *_ = zip(*held, strict=True)
        return (
            summed_length("query", queries, self.layouts[0], self._degrees),
            summed_length("key", keys, self.layouts[1], self._degrees),
        )

    def largest_shard(self, seq_len: int) -> int:
        """Queries of the rank that holds most."""
        if self.size == 1:
            return seq_len
        return max(shares(self.layouts[0], seq_len, *self._degrees))

    def is_spread(self, lengths: tuple[int, int] | None) -> bool:
        """False where all queries lie on one rank of several, or that cannot be told.

        There ``nn.TransformerEncoder`` takes that rank's mask for the causal one, of its own
        accord and on that rank alone.
        """
        if self.size == 1 or lengths is None:
            return self.size == 1
        if isinstance(self.layouts[0], str):
            return lengths[0] > 1
        return not torch.compiler.is_compiling() and self.largest_shard(lengths[0]) < lengths[0]

    def gather(self, x: Tensor, key_len: int, validate: bool) -> Tensor:
        """(N, local keys, ...) of every rank -> (N, all keys, ...), differentiable."""
        return unshard_sequence(x, self.mesh, 1, self.layouts[1], key_len, validate=validate)
