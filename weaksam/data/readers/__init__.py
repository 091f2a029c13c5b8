"""Datasets, results and reviews as other programs write them, a format a file."""
