"""Imitates `_torch/modules/`."""
