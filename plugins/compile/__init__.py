"""Triton kernels to PTX, and the tactics that they are compiled with."""
