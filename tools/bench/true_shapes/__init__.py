"""A model of few layers at its true width, heads, tokens and lengths, on one core of a CPU."""
