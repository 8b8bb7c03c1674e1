"""What differs between the releases of compressed-tensors that tests run with."""

from __future__ import annotations

import importlib.metadata
import inspect
from typing import Any


def has_library(oldest: tuple[int, int] = (0, 9)) -> bool:
    """Whether this release of compressed-tensors or a newer one is installed.

    0.15 has another interface than those before it; 0.20 has the arguments, presets and decoders that are written down.
    """
    try:
        major, minor = (int(part) for part in importlib.metadata.version("compressed-tensors").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return False
    return (major, minor) >= oldest


def writes_sparse_files() -> bool:
    """Whether a release of compressed-tensors is installed that has `save_compressed`: 0.9 to 0.14."""
    return has_library() and not has_library((0, 15))


def attach_schemes(model: Any, config: Any) -> None:
    """Attach quantization schemes to the modules of a model; older releases show no progress."""
    from compressed_tensors.quantization import apply_quantization_config

    progress = "show_progress" in inspect.signature(apply_quantization_config).parameters
    apply_quantization_config(model, config, **({"show_progress": False} if progress else {}))
