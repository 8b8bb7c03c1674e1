"""Imitates `models/`."""
