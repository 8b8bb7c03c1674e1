"""Imitates `inputs/`."""
