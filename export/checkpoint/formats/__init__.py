"""Formats of weight files, read strictly: bytes to named tensors that stay mapped to the file."""
