"""The PyTorch subjects: eager, compiled, captured or not."""
