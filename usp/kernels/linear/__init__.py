"""Linear attention in chunks of tokens: states before chunks, and what tokens see."""
