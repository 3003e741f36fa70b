"""Layers of linear attention in a cache of transformers: a state and a window of the convolution,
which do not grow with the sequence, so every rank holds them all.

A prompt is computed as it is spread: the last tokens in front of the convolution are taken from the
ranks that hold them, and the state behind the last token is what ``linear_attention`` returns on
every rank. Tokens that come later are computed on every rank, by transformers' own functions.
"""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from usp.distributed.mesh import SequenceMesh
from usp.integrations._answer import Tokens
from usp.integrations._region import current_region


class StatesLayer:
    """One layer, over transformers' own, which keeps what it is given in place."""

    def __init__(self, mesh: SequenceMesh | None) -> None:
        super().__init__()
        self.mesh = mesh

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """What comes to the convolution, (B, channels, tokens): this rank's, where tokens are
        spread.

        Returns:
            What is convolved: behind what is kept, where something is.
        """
        theirs, region = cast(Any, super()), current_region()
        if region is None:
            return cast(Tensor, theirs.update_conv_state(conv_states, state_idx, **kwargs))
        kept = "a state" if cast(Any, self).has_previous_state[state_idx] else ""
        check_spread(region.tokens, self.mesh, kept)
        spread = region.tokens.spread
        width = kwargs.get("conv_kernel_size") or conv_states.shape[-1]
        with region.paused(), torch.no_grad():
            last = range(max(0, spread.seq_len - width), spread.seq_len)
            theirs.update_conv_state(spread.take(conv_states, last, dim=2), state_idx, **kwargs)
        region.keeps_state = True
        return conv_states

    def batch_select_indices(self, indices: Tensor) -> None:
        """These samples alone."""
        self._select(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sample so many times."""
        self._select(lambda x: x.repeat_interleave(repeats, 0))

    def _select(self, chosen: Any) -> None:
        for states in (cast(Any, self).conv_states, cast(Any, self).recurrent_states):
            states.update({i: chosen(x) for i, x in states.items() if x is not None})

    def activate_past_recording(self) -> NoReturn:
        """Raises:
        NotImplementedError: a state does not go back.
        """
        raise NotImplementedError(
            "a state of linear attention cannot be put back by a few tokens, so a sharded cache "
            "with such layers records no past: generate without an assistant model"
        )


def check_spread(tokens: Tokens, mesh: SequenceMesh | None, kept: str) -> None:
    """Refuse tokens of a region that do not begin a cache.

    Args:
        kept: What is in it already, in words; "" is nothing.

    Raises:
        ValueError: they are spread over another mesh than the cache.
        NotImplementedError: they were cut outside of the model, are packed, or are not the first.
    """
    spread = tokens.spread
    if spread.mesh is not mesh:
        raise ValueError(
            f"the model is spread over {spread.mesh}, and the cache over {mesh}: make it "
            "with the mesh of usp.parallelize"
        )
    if tokens.cut or spread.cu_seqlens is not None or kept:
        raise NotImplementedError(
            f"{spread.seq_len} tokens come to a cache of {kept or 'nothing'} as they are cut "
            "outside of the model, or packed: give the model whole tokens (outputs='joined'), "
            "without documents, and an empty cache"
        )
