"""Speed and memory measurements beside their bounds and baselines."""
