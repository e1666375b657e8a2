"""RMS norm, rotary embedding and head-major layout of queries and keys in one pass."""
