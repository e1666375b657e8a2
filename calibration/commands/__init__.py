"""The commands `fkv calibrate …`."""
