"""``usp.MultiheadAttention``: the whole contract of torch's own module."""
