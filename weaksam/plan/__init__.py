"""A run in small, and what it makes likely of the whole."""
