"""Doors into models that exist, a library each."""

from usp.integrations.multihead import replace_attention

__all__ = ["replace_attention"]
