"""Checkpoints in the layouts that projects distribute, adapters and shards included."""
