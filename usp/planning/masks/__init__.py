"""Who sees whom: masks are values that say for each query a few intervals of keys."""
