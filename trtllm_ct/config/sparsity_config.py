"""Read the JSON of `sparsity_config` and `moe_sparsity_config`: which weights and experts are not stored.

Sources: compressed-tensors 0.14 config/*.py (weights) and 0.20 config/expert_sparsity.py (experts).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import CompressionFormat
from trtllm_ct.base.str_enum import StrEnum
from trtllm_ct.config.quantization_config import ExpertSparsity, SparsityConfig

if TYPE_CHECKING:
    from trtllm_ct.config.json_object import JsonObject

__all__ = ["read_expert_sparsity", "read_sparsity"]

_KEYS = ("format", "targets", "ignore", "sparsity_structure")
_IGNORED_KEYS = ("global_sparsity", "registry_requires_subclass")
_EXPERT_KEYS = ("method", "num_experts")


class _Format(StrEnum):
    DENSE = CompressionFormat.DENSE.value
    SPARSE_BITMASK = CompressionFormat.SPARSE_BITMASK.value
    SPARSE_24_BITMASK = CompressionFormat.SPARSE_24_BITMASK.value


class _Method(StrEnum):
    PRUNE = "prune"
    NOVICE = "novice"


def read_sparsity(config: JsonObject | None) -> SparsityConfig | None:
    """Return how sparse weights are stored; None when there are none.

    That is the case for an empty block, and for format dense, which stores zeros like any other value.
    """
    if config is None or not config.raw:
        return None
    config.warn_unknown(_KEYS, _IGNORED_KEYS)
    declared = config.required_choice("format", _Format)
    targets = config.patterns("targets")
    ignore = config.patterns("ignore")
    structure = config.hint("sparsity_structure")
    if declared in (None, _Format.DENSE):
        return None
    return SparsityConfig(
        format=CompressionFormat(declared),
        targets=targets,
        ignore=ignore,
        sparsity_structure=structure.lower() if structure else None,
    )


def read_expert_sparsity(config: JsonObject | None) -> ExpertSparsity | None:
    """Return how many experts each layer holds when some were removed; None when the block is missing or invalid."""
    if config is None:
        return None
    config.warn_unknown(_EXPERT_KEYS)
    method = config.required_choice("method", _Method)
    counts = config.raw.get("num_experts")
    if not isinstance(counts, list) or not all(count is None or type(count) is int for count in counts):
        config.fault("num_experts", expected="a list with one integer or null per decoder layer")
        return None
    return ExpertSparsity(method=str(method), num_experts=tuple(counts))
