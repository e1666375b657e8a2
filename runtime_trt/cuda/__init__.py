"""CUDA without PyTorch: buffers, streams, and one graph a chunk."""
