"""Imitates `executor/`."""
