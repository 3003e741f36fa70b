"""What tests judge by: a dense fp64 oracle and counters of bytes, which import nothing of usp."""

from usp.testing.memory import StorageBytes
from usp.testing.oracle import dense_attention, dropout_multiplier, philox, visible_keys
from usp.testing.recurrence import linear_recurrence
from usp.testing.wire import WireBytes

__all__ = [
    "StorageBytes",
    "WireBytes",
    "dense_attention",
    "dropout_multiplier",
    "linear_recurrence",
    "philox",
    "visible_keys",
]
