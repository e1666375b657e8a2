"""What stands below `files.py`: locks, hidden names, and renames that destroy nothing."""
