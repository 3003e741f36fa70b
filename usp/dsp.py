"""DSP, dynamic sequence parallelism: which dim of a tensor the ranks share changes as it is needed.

Tensors of several sequence dims, as those of videos are (time, space), need one of them whole at a
time: sharing another takes one all-to-all of the tensor itself, where attention over a shared dim
takes four, of q, k, v and out. docs/dsp.md has the formulas.

Source: arXiv:2403.10266.
"""

from usp.nn.spatial_temporal import SpatialTemporalBlock
from usp.sharding.dynamic import DynamicShard
from usp.sharding.switch import gather, split, switch

__all__ = ["DynamicShard", "SpatialTemporalBlock", "gather", "split", "switch"]

# Where users find them, and what their pickles name.
for _public in (DynamicShard, SpatialTemporalBlock):
    _public.__module__ = __name__
del _public
