"""What a backend does, and the ones that run a chunk step by step."""
