"""Attention of a chunk that sees what it sees in the long run: lengths baked in."""
