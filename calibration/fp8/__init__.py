"""Scales of linear layers in FP8, measured on rollouts."""
