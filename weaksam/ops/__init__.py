"""Pure functions on arrays and tensors; no files, no settings."""
