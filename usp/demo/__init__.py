"""`usp demo`: a vision transformer on a real picture, on one process and on several.

The same weights run forward and backward twice: with `torch.nn.MultiheadAttention` in one
process, and with `usp.MultiheadAttention` on a mesh of processes. A table says how far the two
lie apart and what each took; a picture shows whom some patches look at. Then the same step over a
longer sequence, in a limit of memory that one process cannot hold it in.
"""

from usp.demo.command import Findings, Refused, add_options, run_demo

__all__ = ["Findings", "Refused", "add_options", "run_demo"]
