"""Selection and compaction of the segments that dynamic heads keep."""
