"""Attention in which every head has its own number of history rows."""
