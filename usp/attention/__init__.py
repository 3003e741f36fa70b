"""Softmax attention on a mesh, from the checked arguments to the ring of blocks."""
