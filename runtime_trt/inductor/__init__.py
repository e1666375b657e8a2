"""Packages of PyTorch's AOTInductor."""
