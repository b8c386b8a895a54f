"""Metrics in pure NumPy; imports nothing else of this package."""
