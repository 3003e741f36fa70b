"""The machine at hand: what it is, what was found out about it, and where that is kept."""
