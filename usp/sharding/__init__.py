"""Cut a sequence into shards and join it again; add up the gradients of its ranks."""
