"""The switch by which a user keeps this package out of the engine's own modules."""

from __future__ import annotations

import os

__all__ = ["NO_PATCH", "patch_allowed"]

NO_PATCH = "TRTLLM_CT_NO_PATCH"
"""Environment variable: 1 forbids this package to put anything into the engine's own modules."""


def patch_allowed() -> bool:
    """Whether the user leaves the engine's modules to this package (`TRTLLM_CT_NO_PATCH`)."""
    return os.environ.get(NO_PATCH, "") in {"", "0"}
