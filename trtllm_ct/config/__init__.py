"""A quantization block as a typed model."""
