"""What differs between the releases of compressed-tensors that tests run with."""

from __future__ import annotations

import importlib.metadata
import inspect
from typing import Any


def has_newest_library() -> bool:
    """Whether compressed-tensors 0.20 or newer is installed: its arguments, presets and decoders are written down."""
    try:
        major, minor = (int(part) for part in importlib.metadata.version("compressed-tensors").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return False
    return (major, minor) >= (0, 20)


def attach_schemes(model: Any, config: Any) -> None:
    """Attach quantization schemes to the modules of a model; older releases show no progress."""
    from compressed_tensors.quantization import apply_quantization_config

    progress = "show_progress" in inspect.signature(apply_quantization_config).parameters
    apply_quantization_config(model, config, **({"show_progress": False} if progress else {}))
