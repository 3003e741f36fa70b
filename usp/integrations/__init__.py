"""Doors into models that exist, a library each."""

from usp.integrations._boundary import Boundary, Entries, Joint
from usp.integrations._while import parallelized
from usp.integrations.mlp import replace_mlp
from usp.integrations.multihead import replace_attention
from usp.integrations.parallelize import parallelize, restore
from usp.integrations.sdpa import spread_attention

__all__ = [
    "Boundary",
    "Entries",
    "Joint",
    "parallelize",
    "parallelized",
    "replace_attention",
    "replace_mlp",
    "restore",
    "spread_attention",
]
