"""Imitates `_torch/pyexecutor/`."""
