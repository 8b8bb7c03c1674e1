"""Imitates `_torch/models/`."""
