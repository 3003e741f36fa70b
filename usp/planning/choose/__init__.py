"""Which degrees to choose: memory, bytes and time of a training step by formula, for any model,
cluster and mesh. Pure data; nothing here runs on a device."""
