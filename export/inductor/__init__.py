"""Packages compiled by PyTorch's AOTInductor."""
