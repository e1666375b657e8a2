"""What a cache policy costs the digits model in quality."""
