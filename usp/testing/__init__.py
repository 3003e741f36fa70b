"""What tests judge by: a dense fp64 oracle and a byte counter, which import nothing of usp."""

from usp.testing.oracle import dense_attention, dropout_multiplier, philox, visible_keys
from usp.testing.wire import WireBytes

__all__ = ["WireBytes", "dense_attention", "dropout_multiplier", "philox", "visible_keys"]
