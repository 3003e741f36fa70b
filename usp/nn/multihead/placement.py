"""Where the tokens of an attention module live, and by which way they meet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from usp.backends import check_name
from usp.distributed.agreement import check_validate
from usp.distributed.mesh import SequenceMesh
from usp.distributed.transport import check_transport
from usp.planning.layout import Layout, check_layout, pieces, row_lengths, whole_lengths
from usp.planning.mask import Mask, make_mask
from usp.sharding.sequence import unshard_sequence


@dataclass(frozen=True)
class Placement:
    """The options that ``MultiheadAttention`` has beyond torch's; see there."""

    mesh: SequenceMesh | None = None
    layout: Layout = "contiguous"
    seq_len: int | tuple[int, int] | str | None = None
    transport: str = "ring"
    backend: str = "auto"
    validate: str = "first"
    causal: bool = False
    window_size: tuple[int | None, int | None] = (None, None)

    def __post_init__(self) -> None:
        check_layout(self.layout)
        check_name(self.backend)
        check_transport(self.transport)
        check_validate(self.validate)
        if isinstance(self.seq_len, str) and self.seq_len != "infer":
            raise ValueError(
                f"seq_len must be a number, a pair of numbers, None or 'infer', "
                f"got {self.seq_len!r}"
            )
        self.mask(False)

    @property
    def size(self) -> int:
        """Ranks that share the sequence."""
        return 1 if self.mesh is None else self.mesh.size

    def mask(self, causal: bool) -> Mask:
        """The interval mask of a call that is ``causal`` on top of the options."""
        return make_mask(causal=self.causal or causal, window_size=self.window_size)

    def lengths(self, query_len: int, key_len: int, device: torch.device) -> tuple[int, int]:
        """Queries and keys of the whole sequence.

        Args:
            query_len, key_len: Local tokens.
            device: Of the tokens; "infer" sums them up on it, a collective.
        """
        seq_len, mesh = self.seq_len, self.mesh
        if seq_len == "infer" and mesh is not None:
            total = torch.tensor((query_len, key_len), device=device)
            queries, keys = mesh.all_reduce(total).tolist()
            return queries, keys
        named = None if isinstance(seq_len, str) else seq_len
        return whole_lengths((query_len, key_len), self.size, self.layout, named)

    def largest_shard(self, seq_len: int) -> int:
        """Tokens of the rank that holds most."""
        if self.mesh is None:
            return seq_len
        longest = max(row_lengths(self.layout, seq_len, self.mesh.ring_degree))
        return pieces(longest, self.mesh.ulysses_degree)[0]

    def is_spread(self, query_len: int) -> bool:
        """False where all queries lie on one rank of several.

        There ``nn.TransformerEncoder`` takes that rank's mask for the causal one, of its own
        accord and on that rank alone.
        """
        return self.size == 1 or self.largest_shard(query_len) < query_len

    def gather(self, x: Tensor, key_len: int, validate: bool) -> Tensor:
        """(N, local keys, ...) of every rank -> (N, all keys, ...), differentiable."""
        return unshard_sequence(x, self.mesh, 1, self.layout, key_len, validate=validate)
