"""The denoiser in PyTorch, its graphs, and how they are captured."""
