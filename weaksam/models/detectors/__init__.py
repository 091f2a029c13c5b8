"""Detectors that learn from boxes and masks."""
