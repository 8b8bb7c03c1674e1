"""The environment variable with which a user forbids this package to patch the engine's modules."""

from __future__ import annotations

import os

__all__ = ["NO_PATCH", "patch_allowed"]

NO_PATCH = "TRTLLM_CT_NO_PATCH"
"""Environment variable: 1 forbids this package to change anything in the engine's modules."""


def patch_allowed() -> bool:
    """Whether this package may patch the engine's modules: `TRTLLM_CT_NO_PATCH` is unset, empty or 0."""
    return os.environ.get(NO_PATCH, "") in {"", "0"}
