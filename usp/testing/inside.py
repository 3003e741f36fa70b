"""Modes that listen, inside of ops that are opaque to others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Ops of usp that make tensors and communicate inside. Their first argument is a tensor.
OPAQUE = {"usp::attention", "usp::attention_gradients"}
OPAQUE |= {"usp::latent_attention", "usp::latent_attention_gradients"}


def call_inside(
    mode: TorchDispatchMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Call one of these ops and listen on: what it does is hidden from modes as a rule.

    Raises:
        NotImplementedError: another mode is around this one.
    """
    if torch._C._len_torch_dispatch_stack():
        raise NotImplementedError(
            f"{type(mode).__name__} must be the outermost mode, to hear ops inside"
        )
    name = torch._C._dispatch_key_for_device(args[0].device.type)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    with mode:
        return func.redispatch(keys, *args, **kwargs)
