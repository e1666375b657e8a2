"""Measures a model on real rollouts: which attention heads are static."""
