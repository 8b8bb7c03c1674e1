"""TensorRT-LLM, PyTorch backend: compressed-tensors checkpoints loaded in process."""
