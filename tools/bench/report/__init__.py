"""Rows of measurements, and tables and charts of them."""
