"""Exact attention over sequences too long for one device: Ulysses x Ring on one mesh."""

from usp import rng
from usp._version import __version__
from usp.backends import backends
from usp.functional import long_context_attention
from usp.gradients import all_reduce_gradients
from usp.integrations import replace_attention
from usp.layout import DocumentZigzag
from usp.mesh import SequenceMesh, init_mesh
from usp.module import LongContextAttention
from usp.multihead_attention import MultiheadAttention
from usp.sharding import positions, shard_sequence, unshard_sequence

__all__ = [
    "DocumentZigzag",
    "LongContextAttention",
    "MultiheadAttention",
    "SequenceMesh",
    "__version__",
    "all_reduce_gradients",
    "backends",
    "init_mesh",
    "long_context_attention",
    "positions",
    "replace_attention",
    "rng",
    "shard_sequence",
    "unshard_sequence",
]
