"""The command `fkv plan`."""
