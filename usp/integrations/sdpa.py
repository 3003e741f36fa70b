"""The door of models that call ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from collections.abc import Sequence

from usp.integrations._answer import Tokens
from usp.integrations._led import lead_through
from usp.integrations._region import Region
from usp.nn.spread import Spread


def spread_attention(spread: Spread, *, whole: Sequence[int] = (), watch: bool = True) -> Region:
    """A context in which ``F.scaled_dot_product_attention`` means the whole sequence.

    What is called inside with this rank's tokens, ``(..., heads, local tokens, head dim)``, is
    answered with the attention of these queries to the keys of all ranks. Models stay as they are,
    whatever name they know the function by; ``torch.compile`` keeps it in the graph; calls outside,
    and in other threads, are torch's. Dropout (``F.dropout``) draws other numbers on each rank, and
    as many on all, so that their generators stay in step.

    Args:
        spread: Who holds which tokens.
        whole: Lengths of other sequences that every rank holds whole, a text say: their keys are
            looked at where the call is, by local queries (not causally) or by whole ones.
        watch: Refuse what looks like attention by hand (a softmax over a square of local scores)
            and like positions made of local tokens (``torch.arange``).

    Returns:
        The context, whose ``answered`` counts the calls.

    Raises:
        ValueError: ``whole`` names a length that some rank's share has too. In the region: a call
            has other lengths, or a mask that does not hold all keys; on every rank that meets.
        NotImplementedError: in the region, on several ranks: attention that is not seen to mean
            the whole (``F.multi_head_attention_forward``, by hand); ``flex_attention`` with a
            ``score_mod`` or a mask of each head; a reentrant activation checkpoint inside of it,
            which computes again when it has ended.

    ``attn_mask`` is bool (True is seen) or float, broadcast over batch, heads and rows: of all
    keys, for the local queries, for one, or for all queries, of which the local rows are taken; or
    one row of this rank's keys. ``is_causal`` goes by global positions. The
    ``block_mask`` of ``flex_attention`` is of the whole sequence, and is taken where
    ``usp.masks.from_function`` finds few bands in it.

    Example:
        >>> spread = usp.Spread(mesh, seq_len=x.shape[1])
        >>> x = spread.shard(x)
        >>> with usp.spread_attention(spread):
        ...     x = self.blocks(x)                            # as it was
        >>> x = spread.unshard(x)
    """
    lead_through()
    return Region(Tokens.of(spread, whole), watch)
