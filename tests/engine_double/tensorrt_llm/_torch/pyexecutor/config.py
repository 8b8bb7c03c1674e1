"""Imitates `_torch/pyexecutor/config.py`, the home of one function before release 1.2."""

from tensorrt_llm._double import RELEASE

if not RELEASE.mapping_argument:
    from tensorrt_llm._torch.pyexecutor.model_loader import _construct_checkpoint_loader  # noqa: F401
