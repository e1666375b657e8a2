"""The operators' kernels on their own: checked, and timed beside baselines."""
