"""What documents cost the ranks that share them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DocumentCost:
    """Seconds of one layer, forward and backward; only their ratios matter.

    Attributes:
        token: Of a token, in all that sees tokens one by one: projections, MLP, norms.
        pair: Of a query and a key that it sees.
        sent: Of a token whose key and value pass from rank to rank (the ring).
        hop: Of one message, however short, times the ranks it passes.
        exchanged: Of a token that leaves with q, k, v and comes back as out (Ulysses).
        call: Of a call of attention whose ranks meet, however short, for each axis of its mesh: a
            rank makes one for each size of groups in which it has documents. That for documents of
            one rank alone costs next to nothing.
    """

    token: float
    pair: float
    sent: float = 0.0
    hop: float = 0.0
    exchanged: float = 0.0
    call: float = 0.0

    def __post_init__(self) -> None:
        for name, seconds in vars(self).items():
            if not 0 <= seconds < float("inf"):
                raise ValueError(f"DocumentCost.{name} must be 0 or more seconds, got {seconds}")

    @classmethod
    def of_layer(
        cls,
        hidden: int,
        mlp: int,
        *,
        kv_hidden: int | None = None,
        flops: float = 1e12,
        bandwidth: float = 1e10,
        latency: float = 2e-5,
        bytes_per_number: int = 2,
    ) -> DocumentCost:
        """Of a transformer's layer, training.

        Args:
            hidden: Features of a token, those of all query heads together.
            mlp: Features inside the MLP, of two matrices.
            kv_hidden: Those of all key heads together; ``hidden`` by default.
            flops: That a rank reaches in a second.
            bandwidth: Bytes that a rank sends in a second.
            latency: Seconds of a short message.
            bytes_per_number: Of a key or a value.
        """
        kv = hidden if kv_hidden is None else kv_hidden
        weights = 2 * hidden * (hidden + kv) + 2 * hidden * mlp
        # forward: 2 FLOP a weight and a number of a pair; backward twice that, 2.5 times in pairs
        return cls(
            token=3 * 2 * weights / flops,
            pair=3.5 * 4 * hidden / flops,
            # keys and values there in both passes, and their gradients home in fp32
            sent=2 * kv * (2 * bytes_per_number + 4) / bandwidth,
            hop=3 * latency,
            exchanged=2 * 2 * (hidden + kv) * bytes_per_number / bandwidth,
        )

    def of_document(self, tokens: int, ring: int, ulysses: int = 1) -> float:
        """Seconds of each rank of a ring x Ulysses group, causal; pairs are balanced over them."""
        ranks, pairs = ring * ulysses, tokens * (tokens + 1) / 2
        passed = tokens * (ring - 1) / ranks  # from all other rows of the ring, 1/ulysses of heads
        scattered = tokens / ranks * (ulysses - 1) / ulysses
        computed = (self.token * tokens + self.pair * pairs) / ranks
        return computed + self.sent * passed + self.exchanged * scattered

    def of_group(self, ring: int, ulysses: int = 1) -> float:
        """Seconds of a group's call and its messages, whatever it holds."""
        axes = (ring > 1) + (ulysses > 1)
        return self.call * axes + self.hop * (ring - 1 + (ulysses > 1))
