"""Similarity of each segment of a frame with the frame after it."""
