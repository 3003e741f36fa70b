"""From tensors to launches of the kernels of linear attention.

Shape letters: B batch, L tokens, H heads, n chunks of them, D key and Dv value channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from usp.kernels.arguments import TensorView, cdiv, is_wide, padded, view_of
from usp.kernels.linear import configs
from usp.kernels.linear.channel_gradients import channel_gradients_kernel
from usp.kernels.linear.channels import pairs_kernel
from usp.kernels.linear.decay_gradient import decay_kernel
from usp.kernels.linear.read import read_kernel
from usp.kernels.linear.states import states_kernel


class StatesSizes(NamedTuple):
    """Head h reads head h // x_group of x, and so of y."""

    length: int
    chunks: int
    heads: int
    x_group: int
    y_group: int


class ReadSizes(NamedTuple):
    """As ``StatesSizes``; and the strides of a state's channels."""

    length: int
    chunks: int
    heads: int
    x_group: int
    y_group: int
    z_group: int
    out_group: int
    x_stride: int
    e_stride: int


class DecaySizes(NamedTuple):
    """As ``StatesSizes``."""

    length: int
    chunks: int
    heads: int
    q_group: int
    k_group: int
    v_group: int


def run_states(
    x: Tensor,
    y: Tensor,
    g: Tensor | None,
    start: Tensor | None,
    heads: int,
    *,
    back: bool = False,
    last_alone: bool = False,
) -> tuple[Tensor, Tensor]:
    """States of chunks, one behind the other.

    Args:
        x: (B, L, ., D), y: (B, L, ., Dv), one dtype: k and v; back q and dout. L is not 0.
        g: (B | 1, L, H | 1) fp32 logs of decays, (B | 1, L, H | 1, D) with one a channel, or None.
        start: (B, H, D, Dv) fp32, contiguous: the state before the first chunk, or the gradient of
            that behind the last; None is 0.
        last_alone: Nobody asks for those of chunks; there are none of them in what is returned.

    Returns:
        (B, H, n, D, Dv), what is before each chunk, or back behind it, as products read it; and
        (B, H, D, Dv) fp32, what is behind all of them, or back before.
    """
    batch, length, _, dim = x.shape
    value_dim, chunks = y.shape[3], _chunks(x, g)
    last = x.new_empty((batch, heads, dim, value_dim), dtype=torch.float32)
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    kept = 0 if last_alone else chunks
    states = x.new_empty((batch, heads, kept, dim, value_dim), dtype=dtype)
    config = configs.config("states", x.dtype, x.device)
    block_x, block_e = min(config.block_x, padded(dim)), min(config.block_e, padded(value_dim))
    states_kernel[(cdiv(dim, block_x) * cdiv(value_dim, block_e) * batch * heads,)](
        view_of(x),
        view_of(y),
        _decay_view(g),
        start,
        None if last_alone else states,
        last,
        StatesSizes(length, chunks, heads, heads // x.shape[2], heads // y.shape[2]),
        X=dim,
        BLOCK_X=block_x,
        E=value_dim,
        BLOCK_E=block_e,
        BACK=back,
        CHANNELS=_has_channels(g),
        **_shared(config, g, x, y),
    )
    return states, last


def run_read(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    g: Tensor | None,
    states: Tensor,
    out: Tensor,
    *,
    pairs: Tensor | None = None,
    transposed: bool = False,
    back: bool = False,
) -> None:
    """What tokens see of states and of their own chunk, written to ``out``; see ``read``.

    Args:
        pairs: Of ``run_pairs``, with a decay a channel.
        x, y: (B, L, ., X), z: (B, L, ., E), one dtype. L is not 0.
        states: (B, H, n, X, E), or transposed (B, H, n, E, X); of ``run_states``.
        out: (B, L, ., E), like z. Each head has the sum of those that share it.
    """
    batch, length, _, dim = x.shape
    heads, chunks, width = states.shape[1], states.shape[2], z.shape[3]
    strides = states.stride()[3:]
    config = configs.config("read", x.dtype, x.device)
    block_x, block_e = min(config.block_x, padded(dim)), min(config.block_e, padded(width))
    groups = (heads // each.shape[2] for each in (x, y, z, out))
    read_kernel[(chunks * cdiv(width, block_e) * batch * out.shape[2],)](
        *map(view_of, (x, y, z)),
        _decay_view(g),
        pairs,
        states,
        view_of(out),
        ReadSizes(length, chunks, heads, *groups, *(strides[::-1] if transposed else strides)),
        X=dim,
        BLOCK_X=block_x,
        E=width,
        BLOCK_E=block_e,
        BACK=back,
        **_shared(config, g, x, y, z, out),
    )


def run_decay_gradient(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, g: Tensor, states: Tensor, dstates: Tensor
) -> Tensor:
    """The gradient of the log decay of each token and head, (B, H, L) fp32.

    Args:
        q, k: (B, L, ., D). v: (B, L, ., Dv). dout: (B, L, H, Dv). L is not 0.
        states, dstates: Of ``run_states``, before each chunk, and back behind it.
    """
    batch, length, _, dim = q.shape
    heads, chunks, value_dim = states.shape[1], states.shape[2], v.shape[3]
    dg = q.new_empty((batch, heads, length), dtype=torch.float32)
    config = configs.config("decay", q.dtype, q.device)
    groups = (heads // each.shape[2] for each in (q, k, v))
    decay_kernel[(chunks * batch * heads,)](
        *map(view_of, (q, k, v, dout)),
        _decay_view(g),
        states,
        dstates,
        dg,
        DecaySizes(length, chunks, heads, *groups),
        D=dim,
        BLOCK_D=min(config.block_x, padded(dim)),
        DV=value_dim,
        BLOCK_DV=min(config.block_e, padded(value_dim)),
        **_shared(config, g, q, k, v, dout),
    )
    return dg


def run_pairs(q: Tensor, k: Tensor, g: Tensor, heads: int) -> Tensor:
    """What tokens of a chunk see of each other with a decay a channel, (B, H, n, C, C).

    Args:
        q, k: (B, L, ., D). g: (B | 1, L, H | 1, D). L is not 0.
    """
    batch, length, _, dim = q.shape
    chunks, size = _chunks(q, g), configs.CHANNEL_CHUNK
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    pairs = q.new_empty((batch, heads, chunks, size, size), dtype=dtype)
    config = configs.config("pairs", q.dtype, q.device)
    pairs_kernel[(chunks * batch * heads,)](
        view_of(q),
        view_of(k),
        _decay_view(g),
        pairs,
        StatesSizes(length, chunks, heads, heads // q.shape[2], heads // k.shape[2]),
        D=dim,
        BLOCK_D=min(config.block_x, padded(dim)),
        **_shared(config, g, q, k),
    )
    return pairs


def run_channel_gradients(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, g: Tensor, states: Tensor, dstates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq and dk in the dtype of q and the gradient of the logs in fp32, (B, L, H, D) each; of heads
    that share one, dq and dk in fp32, not yet summed.

    Args:
        As of ``run_decay_gradient``.
    """
    batch, length, _, dim = q.shape
    heads, chunks, value_dim = states.shape[1], states.shape[2], v.shape[3]

    def room(dtype: torch.dtype) -> Tensor:
        return q.new_empty((batch, length, heads, dim), dtype=dtype)

    dq, dk = (room(x.dtype if x.shape[2] == heads else torch.float32) for x in (q, k))
    dg = room(torch.float32)
    config = configs.config("channels", q.dtype, q.device)
    block_d = min(config.block_x, padded(dim))
    groups = (heads // each.shape[2] for each in (q, k, v))
    channel_gradients_kernel[(chunks * cdiv(dim, block_d) * batch * heads,)](
        *map(view_of, (q, k, v, dout)),
        _decay_view(g),
        states,
        dstates,
        *map(view_of, (dq, dk, dg)),
        DecaySizes(length, chunks, heads, *groups),
        D=dim,
        BLOCK_D=block_d,
        DV=value_dim,
        BLOCK_DV=min(config.block_e, padded(value_dim)),
        **_shared(config, g, q, k, v, dout, dq),
    )
    return dq, dk, dg


def _has_channels(g: Tensor | None) -> bool:
    return g is not None and g.dim() == 4


def _chunks(x: Tensor, g: Tensor | None) -> int:
    return cdiv(x.shape[1], configs.chunk(x.dtype, _has_channels(g)))


def _shared(config: configs.Config, g: Tensor | None, *tokens: Tensor) -> dict[str, Any]:
    x, channels = tokens[0], _has_channels(g)
    laid_out = (*tokens, g) if g is not None and channels else tokens
    return configs.launch(config, x.device) | {
        "CHUNK": configs.chunk(x.dtype, channels),
        "PRECISION": configs.precision(x.dtype, x.device),
        "WIDE": is_wide(*laid_out),
    }


def _decay_view(g: Tensor | None) -> TensorView | None:
    """With strides 0 where samples or heads share one."""
    if g is None:
        return None
    batch, row, head = g.stride()[:3]
    return TensorView(g, batch * (g.shape[0] > 1), row, head * (g.shape[2] > 1))
