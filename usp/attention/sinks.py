"""Sinks: a learned logit of each head, which takes its share of the weights and gives nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from usp.attention.given import Options
from usp.planning.problem import state_dtype


def beside_sinks(
    options: Options, attend: Callable[[Options], Tensor | tuple[Tensor, Tensor]]
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by ``attend``, and what sinks leave of it where the options name some."""
    if options.sinks is None:
        return attend(options)
    out, lse = attend(replace(options, return_lse=True))
    out, lse = with_sinks(out, lse, options.sinks)
    return (out, lse) if options.return_lse else out


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """What attention gives where each row sees one more key, of value 0 and of its head's logit.

    Once, after the last block: ``exp(lse) / (exp(lse) + exp(sink))`` is what is left of the
    weights of the other keys.

    Args:
        out: (B, Lq, H, Dv). lse: (B, H, Lq) in the dtype of the state.
        sinks: (H,) any float dtype.

    Returns:
        out in its dtype, and the LSE with the sink in it; both differentiable, in the sinks too.
    """
    sink = sinks.to(lse.dtype)[:, None]
    left = torch.sigmoid(lse - sink).transpose(1, 2)[..., None]
    return (out.to(state_dtype(out.dtype)) * left).to(out.dtype), torch.logaddexp(lse, sink)
