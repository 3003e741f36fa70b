"""A sequence that nobody cut: every rank holds the same tokens.

Masks by global position would take them for different ones, right on the first rank alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from usp.distributed.agreement import digest
from usp.distributed.comm import untraced

_ENDS = 64


@untraced
def content(x: Tensor, token_dim: int) -> int:
    """A number that stands for the tokens of a rank; 0 where equal ones would say nothing.

    That is where tokens do not differ among themselves, as in calls that only warm up, and
    where there are fewer than two. One pass over ``x``; a device is waited for.

    Args:
        x: (..., tokens, ..., E), floating point.
        token_dim: Of the tokens.
    """
    if x.shape[token_dim] < 2 or not x.numel():
        return 0
    x = x.detach()
    seen = x @ torch.linspace(1, 2, x.shape[-1], dtype=x.dtype, device=x.device)
    if (seen == seen.narrow(token_dim, 0, 1)).all():
        return 0
    flat = x.reshape(-1)
    parts = (seen.reshape(-1), flat[:_ENDS], flat[-_ENDS:])
    return digest(str([part.double().tolist() for part in parts]))


def refuse_equal(contents: Sequence[int], tokens: int) -> None:
    """Refuse what every rank holds alike.

    Args:
        contents: Of each rank; the same list on all of them.
        tokens: Local ones.

    Raises:
        ValueError: on all ranks.
    """
    if contents[0] and len(set(contents)) == 1:
        raise ValueError(
            f"all {len(contents)} ranks of the mesh hold the same {tokens} tokens, and the mask "
            "goes by global positions: cut the sequence with usp.shard_sequence before the model "
            "(or pass validate='never' if equal shards are meant)"
        )
