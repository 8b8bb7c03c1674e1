"""Imitates `_torch/`."""
