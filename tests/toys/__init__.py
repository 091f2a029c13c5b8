"""A toy of each thing that can be added, each the one file that CONTRIBUTING.md says."""
