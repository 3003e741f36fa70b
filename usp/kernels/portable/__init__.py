"""Kernels in Triton for every GPU; they take every call."""
