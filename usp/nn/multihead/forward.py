"""Multi-head attention between its projections: attention, extra keys, weights.

Shape letters: N batch, L local queries, S local keys, H heads, D head dim, E extra keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from usp.attention import functional
from usp.attention.given import Tensors
from usp.attention.visible import visible
from usp.distributed.agreement import When
from usp.nn.multihead.arguments import additive
from usp.nn.multihead.extra_keys import ExtraKeys
from usp.nn.multihead.placement import Placement
from usp.nn.multihead.weights import attention_weights, check_size
from usp.ops import philox
from usp.planning.masks.mask import Everything
from usp.planning.problem import state_dtype
from usp.sharding.sequence import positions


@dataclass
class Projected:
    """One call, ready to attend.

    Attributes:
        q: (N, L, H, D). k, v: (N, S, H, D). This rank's tokens.
        padding: (N, S) key padding mask, bool or float, or None.
        bias: (N|1, H|1, L, all keys) added to the scores, or None.
        causal: Whether keys after a query are hidden.
        lengths: Queries and keys of the whole sequence; None where attention is to ask for them.
        dropout_p: Of the weights.
        dropout_seed: Its seed, or None where attention alone needs it and draws it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    padding: Tensor | None
    bias: Tensor | None
    causal: bool
    lengths: tuple[int, int] | None
    dropout_p: float
    dropout_seed: int | Tensor | None

    @property
    def whole(self) -> tuple[int, int]:
        """The lengths of a call that needs them outside of attention."""
        assert self.lengths is not None
        return self.lengths

    @property
    def softmax_scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)


def with_columns(call: Projected, placement: Placement, validate: bool) -> Projected:
    """The call with its float padding, if it has any, added to the bias; a collective then."""
    if call.padding is None or call.padding.dtype == torch.bool:
        return call
    return replace(call, padding=None, bias=_padded_bias(call, placement, validate))


def attend(
    call: Projected, placement: Placement, extra: ExtraKeys | None, validate: When
) -> Tensor:
    """(N, L, H, D), the attention of this rank's queries to all keys and ``extra``."""
    told = placement.told | {
        "causal": placement.causal or call.causal,
        "seq_len": call.lengths,
        "dropout_p": call.dropout_p,
        "return_lse": extra is not None,
    }
    tensors = Tensors(call.q, call.k, call.v, call.padding, call.bias)
    result = functional.attend(tensors, told, placement.mesh, call.dropout_seed, validate)
    if extra is None:
        return cast(Tensor, result)
    out, lse = result
    keep = None
    if call.dropout_p:
        keys = call.whole[1]
        keep = _keep(call, placement, range(keys, keys + len(extra.k)))
    return extra.merge(out, lse, extra.scores(call.q, call.softmax_scale), keep)


def weights(call: Projected, placement: Placement, extra: ExtraKeys | None) -> Tensor:
    """(N, H, L, all keys + E) in the dtype of q; a collective on a mesh.

    Raises:
        NotImplementedError: they do not fit; see ``check_weights``.
    """
    q, keys = call.q, call.whole[1]
    mask = placement.whole_mask(call.causal)
    seen = None
    if mask != Everything():
        q_pos = positions(call.whole[0], placement.mesh, placement.layouts[0])
        seen = visible(mask, q_pos, keys).to(q.device)
    rows = attention_weights(
        q,
        placement.gather(call.k, keys, validate=False),  # attention has compared
        call.softmax_scale,
        seen,
        call.bias if call.padding is None else _padded_bias(call, placement, validate=False),
        None if extra is None else extra.scores(q, call.softmax_scale),
    )
    if call.dropout_p:
        rows = rows * _keep(call, placement, range(rows.shape[-1]))
    return rows.to(q.dtype)


def check_weights(call: Projected, placement: Placement) -> None:
    """Refuse weights that do not fit, on every rank alike.

    Raises:
        NotImplementedError: names their size and the bound.
    """
    if placement.size > 1 and torch.compiler.is_compiling():
        return  # shares are tables, which no graph can look up
    (batch, _, num_heads, _), (queries, keys) = call.q.shape, call.whole
    check_size(batch, num_heads, placement.largest_shard(queries), keys, state_dtype(call.q.dtype))


def _padded_bias(call: Projected, placement: Placement, validate: bool) -> Tensor:
    """The bias with the padding of all keys, (N, H|1, L|1, all keys)."""
    assert call.padding is not None
    columns = placement.gather(additive(call.padding, call.q.dtype), call.whole[1], validate)
    columns = columns[:, None, None]
    return columns if call.bias is None else call.bias + columns


def _keep(call: Projected, placement: Placement, keys: range) -> Tensor:
    """(N, H, L, len(keys)) dropout factors of this rank's queries."""
    batch, _, num_heads, _ = call.q.shape
    first, total = placement.heads or (0, num_heads)
    assert call.dropout_seed is not None
    q_pos = positions(call.whole[0], placement.mesh, placement.layouts[0], call.q.device)
    k_pos = torch.arange(keys.start, keys.stop, device=call.q.device)
    streams = total * torch.arange(batch, device=q_pos.device)[:, None] + first
    streams = (streams + torch.arange(num_heads, device=q_pos.device))[:, :, None, None]
    factors = philox.dropout_factors(
        call.dropout_p, streams, q_pos[:, None], k_pos, call.dropout_seed
    )
    return factors.to(state_dtype(call.q.dtype))
