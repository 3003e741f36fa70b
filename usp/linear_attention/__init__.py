"""Linear attention: states of chunks, and of ranks, joined in the order of the sequence."""
