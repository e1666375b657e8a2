"""Bundles: writing them, and reading their weights and graphs."""
