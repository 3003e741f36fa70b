"""``nn.Module``s over attention."""
