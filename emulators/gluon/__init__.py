"""Gluon's language on the CPU: the kernels' own functions on an emulated Hopper."""
