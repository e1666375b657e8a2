"""What runs a video decoder."""
