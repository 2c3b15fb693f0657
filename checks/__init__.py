"""Checks before a run and images that show what it does."""
