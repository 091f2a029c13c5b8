"""weaksam: from image-level labels to boxes, masks and detectors, as batch jobs on Ray."""

__version__ = "0.2.0"
