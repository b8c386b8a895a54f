"""Conversion between weights on disk and parameter trees."""
