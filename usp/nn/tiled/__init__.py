"""Modules that treat each token by itself, computed in tiles of tokens."""
