"""Exact attention over sequences too long for one device: Ulysses x Ring on one mesh."""

from usp import dsp, rng
from usp._version import __version__
from usp.attention.functional import long_context_attention
from usp.attention.latent import latent_attention
from usp.backends import backends, use_kernel
from usp.distributed.making import init_mesh
from usp.distributed.mesh import SequenceMesh
from usp.distributed.submeshes import submeshes
from usp.integrations import (
    Boundary,
    parallelized,
    replace_attention,
    replace_mlp,
    restore,
    spread_attention,
)
from usp.integrations.parallelize import parallelize
from usp.linear_attention.functional import linear_attention
from usp.nn.batch import cut_batch
from usp.nn.cache import ShardedCache
from usp.nn.decoding import decode_attention
from usp.nn.documents import DocumentSchedule, schedule_documents
from usp.nn.linear import LinearAttention
from usp.nn.long_context import LongContextAttention
from usp.nn.multihead.module import MultiheadAttention
from usp.nn.spread import Spread
from usp.nn.tiled.module import tiled_mlp
from usp.planning.document_cost import DocumentCost
from usp.planning.layout import DocumentZigzag, Held
from usp.sharding.convolution import causal_conv1d
from usp.sharding.gradients import all_reduce_gradients
from usp.sharding.loss import cross_entropy
from usp.sharding.rows import roll, take
from usp.sharding.sequence import positions, shard_sequence, unshard_sequence
from usp.sharding.statistics import mean, var, var_mean
from usp.sharding.tiled_loss import tiled_cross_entropy
from usp.sharding.whole import held
from usp.verification.verdict import Verification
from usp.verification.verify import verify

__all__ = [
    "Boundary",
    "DocumentCost",
    "DocumentSchedule",
    "DocumentZigzag",
    "Held",
    "LinearAttention",
    "LongContextAttention",
    "MultiheadAttention",
    "SequenceMesh",
    "ShardedCache",
    "Spread",
    "Verification",
    "__version__",
    "all_reduce_gradients",
    "backends",
    "causal_conv1d",
    "cross_entropy",
    "cut_batch",
    "decode_attention",
    "dsp",
    "held",
    "init_mesh",
    "latent_attention",
    "linear_attention",
    "long_context_attention",
    "mean",
    "parallelize",
    "parallelized",
    "positions",
    "replace_attention",
    "replace_mlp",
    "restore",
    "rng",
    "roll",
    "schedule_documents",
    "shard_sequence",
    "spread_attention",
    "submeshes",
    "take",
    "tiled_cross_entropy",
    "tiled_mlp",
    "unshard_sequence",
    "use_kernel",
    "var",
    "var_mean",
    "verify",
]

# Where users find them, and what their pickles name, whatever file they live in.
for _public in (
    Boundary,
    DocumentCost,
    DocumentSchedule,
    DocumentZigzag,
    Held,
    LinearAttention,
    LongContextAttention,
    MultiheadAttention,
    SequenceMesh,
    ShardedCache,
    Spread,
    Verification,
):
    _public.__module__ = __name__
del _public
