"""Search over cache policies."""
