"""The command `fkv demo`."""
