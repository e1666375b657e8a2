"""The chain of candidate frames that both eviction operators read."""
