"""What to export: presets, shipped models, and options resolved to a configuration."""
