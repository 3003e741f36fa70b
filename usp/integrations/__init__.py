"""Doors into models that exist, a library each."""

from usp.integrations.multihead import replace_attention
from usp.integrations.sdpa import spread_attention

__all__ = ["replace_attention", "spread_attention"]
