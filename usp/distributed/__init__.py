"""Who talks to whom: the mesh, its axes, what travels and in which way."""
