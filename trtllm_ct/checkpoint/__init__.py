"""Files on disk; nothing here knows about quantization."""
