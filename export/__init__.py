"""Turns a PyTorch checkpoint into a bundle: the denoiser, its graphs, and their verification."""
