"""Configs shipped with the package; each has `get_config()`, whose docstring is its command."""
