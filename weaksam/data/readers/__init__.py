"""Readers of datasets, results and reviews of other programs, one module per format."""
