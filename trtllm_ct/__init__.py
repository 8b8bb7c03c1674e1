"""Load compressed-tensors checkpoints into TensorRT-LLM."""

__version__ = "0.1.0"
