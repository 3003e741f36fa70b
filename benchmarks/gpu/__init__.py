"""What ``usp bench gpu_attention`` is made of."""
