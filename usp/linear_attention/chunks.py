"""One rank's tokens, in chunks: matrix products whose cost is linear in the length.

Per head ``S_t = diag(exp g_t) S_{t-1} + k_t^T v_t`` and ``o_t = q_t S_t``. Of a chunk of C tokens
the update of the state, what its tokens see of each other, and what they see of the state before
it are products. Kernels may replace ``totals``, ``within`` and ``read``, one by one.

Logs of decays are only ever added up, over the tokens between two others, and never subtracted:
no exponent is above 0 where no decay is, and one of -inf forgets all that was before.

Shape letters: n chunks, B batch, H heads, C tokens of a chunk, D key and Dv value channels. Of g,
b is B or 1, h is H or 1, and d is D for a decay a channel, else 1.

Source: chunks arXiv:2006.16236 (section 3.3), 2312.06635 (GLA), 2405.21060 (SSD).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from usp.ops.precision import einsum

# Tokens of a chunk, and of a block of it in which a decay a channel is worked out pair by pair.
CHUNK, BLOCK = 64, 4


def chunk_size(length: int) -> int:
    """A power of two between BLOCK and CHUNK."""
    size = BLOCK
    while size < min(length, CHUNK):
        size *= 2
    return size


def chunked(x: Tensor, size: int) -> Tensor:
    """(B, L, H, D) as (n, B, H, C, D), behind it zeros: no update and no decay."""
    batch, length, heads, dim = x.shape
    chunks = -(-length // size)
    x = F.pad(x, (0, 0, 0, 0, 0, chunks * size - length))
    return x.reshape(batch, chunks, size, heads, dim).permute(1, 0, 3, 2, 4).contiguous()


def joined(x: Tensor, length: int) -> Tensor:
    """(n, B, H, C, D) as (B, L, H, D)."""
    chunks, batch, heads, size, dim = x.shape
    x = x.permute(1, 0, 3, 2, 4).reshape(batch, chunks * size, heads, dim)
    return x[:, :length]


def totals(k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """What each chunk does to the state before it.

    Args:
        k: (n, B, H, C, D). v: (n, B, H, C, Dv). g: (n, b, h, C, d).

    Returns:
        decays (n, b, h, d, 1) and updates (n, B, H, D, Dv): ``S -> decays * S + updates``.
    """
    kept = k * _to_the_end(g).exp()
    return g.sum(-2).exp()[..., None], einsum("nbhcd,nbhce->nbhde", kept, v)


def read(q: Tensor, g: Tensor, states: Tensor) -> tuple[Tensor]:
    """What tokens see of the state before their chunk.

    Args:
        q: (n, B, H, C, D). g: (n, b, h, C, d). states: (n, B, H, D, Dv).

    Returns:
        (n, B, H, C, Dv).
    """
    return (einsum("nbhcd,nbhde->nbhce", q * g.cumsum(-2).exp(), states),)


def within(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor]:
    """What tokens see of their own chunk, themselves among it.

    Args:
        q, k: (n, B, H, C, D). v: (n, B, H, C, Dv). g: (n, b, h, C, d).

    Returns:
        (n, B, H, C, Dv).
    """
    return (einsum("nbhij,nbhje->nbhie", scores(q, k, g), v),)


def scores(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """Of each two tokens of a chunk ``q_i diag(decays behind j, up to i) k_j``, 0 where j is
    behind i.

    One decay for all channels is a factor of the scores. With one a channel small blocks are
    worked out pair by pair, and then blocks are joined two by two: the later sees the earlier
    through the seam between them.

    Args:
        q, k: (n, B, H, C, D). g: (n, b, h, C, d).

    Returns:
        (n, B, H, C, C).
    """
    size = whole = q.shape[-2]
    if g.shape[-1] > 1:
        size = min(BLOCK, whole)
    q, k, g = (_cut(x, size) for x in (q, k, g))
    decays = _between(g).exp()
    if g.shape[-1] > 1:
        found = (q[..., :, None, :] * k[..., None, :, :] * decays).sum(-1)
    else:
        found = einsum("nbhmid,nbhmjd->nbhmij", q, k) * decays[..., 0]
    while size < whole:
        found = _with_the_earlier(q, k, g, found)
        q, k, g = (_in_pairs(x).flatten(-3, -2) for x in (q, k, g))
        size *= 2
    return found[..., 0, :, :]


def _with_the_earlier(q: Tensor, k: Tensor, g: Tensor, found: Tensor) -> Tensor:
    """Scores of blocks twice as long: the later of each two sees the earlier."""
    q, k, g, found = (_in_pairs(x) for x in (q, k, g, found))
    later = q[..., 1, :, :] * g[..., 1, :, :].cumsum(-2).exp()
    earlier = k[..., 0, :, :] * _to_the_end(g[..., 0, :, :]).exp()
    seam = einsum("nbhmid,nbhmjd->nbhmij", later, earlier)
    above = F.pad(found[..., 0, :, :], (0, seam.shape[-1]))
    return torch.cat((above, torch.cat((seam, found[..., 1, :, :]), -1)), -2)


def _cut(x: Tensor, size: int) -> Tensor:
    """(..., C, d) as (..., blocks, size, d)."""
    return x.unflatten(-2, (x.shape[-2] // size, size))


def _in_pairs(x: Tensor) -> Tensor:
    """(..., blocks, size, d) as (..., blocks / 2, 2, size, d)."""
    return x.unflatten(-3, (x.shape[-3] // 2, 2))


def _to_the_end(g: Tensor) -> Tensor:
    """Of each token the sum over those behind it, (..., C, d)."""
    behind = F.pad(g[..., 1:, :], (0, 0, 0, 1))
    return behind.flip(-2).cumsum(-2).flip(-2)


def _between(g: Tensor) -> Tensor:
    """[i, j]: the sum over tokens behind j, up to i; -inf where j is behind i. (..., C, C, d)."""
    size = g.shape[-2]
    place = torch.arange(size, device=g.device)
    behind = (place[:, None] > place)[..., None]
    sums = torch.where(behind, g[..., :, None, :], 0.0).cumsum(-3)
    return sums.masked_fill((place[:, None] < place)[..., None], float("-inf"))
