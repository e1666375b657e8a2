"""What lies on disk: its schema, its hashes, and how files are written."""
