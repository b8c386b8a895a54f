"""Scores of label lists, in pure NumPy; imports nothing else of this package."""
