"""Lean runtime: opens a bundle and generates video; needs neither torch nor the exporter."""
