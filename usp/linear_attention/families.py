"""Whose kernels compute one rank's tokens: the first family that takes the problem.

Where none does, it is plain PyTorch (``chunks``). What travels between ranks does not depend on who
computes, so ranks may differ in it.
"""

from __future__ import annotations

from usp.linear_attention import native
from usp.linear_attention.kernels import Family, Traits

FAMILIES: tuple[Family, ...] = (native,)


def chosen(traits: Traits) -> Family | None:
    """The first family that takes the problem; None for plain PyTorch."""
    return next((family for family in FAMILIES if not family.reasons_against(traits)), None)
