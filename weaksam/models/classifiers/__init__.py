"""Classifiers of images, with class maps."""
