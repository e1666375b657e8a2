"""The commands `fkv run` and `fkv encode-prompt`."""
