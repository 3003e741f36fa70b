"""A model whole and sharded, side by side: where they part, and why."""
