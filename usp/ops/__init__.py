"""The compiled torch ops, and what moves or joins tensors by whichever of them is there."""
