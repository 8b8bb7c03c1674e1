"""Imitates `_torch/models/checkpoints/hf/`."""
