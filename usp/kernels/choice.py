"""Which kernels do a call, the portable ones or Hopper's, and how they are cut: said once."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from usp.kernels import configs, hopper
from usp.kernels.arguments import KernelOptions
from usp.kernels.configs import Config


def choose(kernel: str, options: KernelOptions, *tensors: Tensor) -> tuple[ModuleType, Any]:
    """The first of ``configs.wanted`` that takes a call.

    Args:
        kernel: As in ``configs.TABLE``.
        tensors: What it loads as (B, L, H, X) tiles.

    Returns:
        ``portable.launch`` or ``hopper.launch``, and a configuration for its functions.
    """
    for config in configs.wanted(kernel, max(x.shape[-1] for x in tensors), tensors[0]):
        if isinstance(config, Config):
            break
        if hopper.takes(kernel, options, *tensors):
            from usp.kernels.hopper import launch as pipelined

            return pipelined, config
    from usp.kernels.portable import launch as portable

    return portable, config
