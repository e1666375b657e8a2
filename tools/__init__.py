"""Command line, demo, benchmarks and evaluation."""
