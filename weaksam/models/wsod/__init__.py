"""Detectors that learn boxes from image-level labels: OICR and MIST."""
