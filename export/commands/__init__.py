"""The commands that make and check bundles."""
