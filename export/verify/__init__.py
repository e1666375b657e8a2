"""Backends against eager PyTorch and against recorded results of the official code."""
