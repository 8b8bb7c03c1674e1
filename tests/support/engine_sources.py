"""Changes of stored tensors that tests of engine-build checkpoints share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["with_shared_globals"]


def with_shared_globals(stored: dict[str, Tensor]) -> None:
    """Give all NVFP4 Linears the same global scales, as writers that know of fusion do."""
    for local in ("weight_global_scale", "input_global_scale"):
        names = [name for name in stored if name.endswith(local)]
        for name in names:
            stored[name] = stored[names[0]].clone()
