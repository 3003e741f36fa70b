"""Whose kernels compute one rank's tokens: the first family that takes the problem.

Where none does, it is plain PyTorch (``chunks``). What travels between ranks does not depend on who
computes, so ranks may differ in it.
"""

from __future__ import annotations

import torch

from usp.linear_attention import native, triton
from usp.linear_attention.kernels import Family, Traits
from usp.linear_attention.trust import is_trusted

FAMILIES: tuple[Family, ...] = (native, triton)


def chosen(traits: Traits) -> Family | None:
    """The first family that takes the problem and is right; None for plain PyTorch."""
    if torch._guards.detect_fake_mode() is not None:  # there is nothing that kernels could read
        return None
    takes = (family for family in FAMILIES if not family.reasons_against(traits))
    return next((family for family in takes if is_trusted(family, traits)), None)
