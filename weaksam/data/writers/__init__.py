"""What other programs read, a format a file."""
