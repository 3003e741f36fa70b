"""Functions that no mode of torch sees, led through usp."""

from __future__ import annotations

from usp.integrations import _flex, _recurrences, _transformers_latents


def lead_through() -> None:
    """From here on they ask whether they are called in a region; once for a process."""
    _flex.lead_through()
    _recurrences.lead_through()
    _transformers_latents.lead_through()
