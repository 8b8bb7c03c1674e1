"""A checkpoint's quantization configuration as frozen values.

JSON ends in `trtllm_ct.config.reader`: nothing after it sees a raw dictionary, an alias or a missing default.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.base.schemes import CompressionFormat, QuantArgs, QuantScheme, RowOrder

__all__ = ["ConfigGroup", "ExpertSparsity", "QuantizationConfig", "SparsityConfig", "Transform"]

_LAST_COMPRESSION_CONFIG = (0, 6, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigGroup:
    """One entry of `config_groups`: which modules it targets and how they are quantized."""

    name: str
    targets: tuple[str, ...]
    scheme: QuantScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class SparsityConfig:
    """The `sparsity_config` block of releases 0.4 to 0.14, when it holds anything."""

    format: CompressionFormat
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    sparsity_structure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSparsity:
    """The `moe_sparsity_config` block: layers that hold fewer experts, renumbered from 0; None for a dense layer."""

    method: str
    num_experts: tuple[int | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """One `apply` entry of `transform_config`: a rotation, where it sits and what it targets.

    `precision` is the torch name of the dtype that online rotations are computed in.
    """

    name: str
    type: str
    location: str
    targets: tuple[str, ...]
    ignore: tuple[str, ...] = ()
    inverse: bool = False
    randomize: bool = False
    head_dim: int | None = None
    precision: str = "float32"

    @property
    def online(self) -> bool:
        """Whether it runs with the model; any other is in the stored weights already."""
        return not self.location.startswith("weight_")

    @property
    def hadamard(self) -> bool:
        """Whether its matrix is a Hadamard matrix, stored without the factor 1 / sqrt(n)."""
        return self.type != "random-matrix"

    @property
    def permuted(self) -> bool:
        """Whether rows and columns of the matrix are reordered by a stored permutation."""
        return self.randomize and self.hadamard

    @property
    def module(self) -> str:
        """The name of the module that holds the matrix, a child of the one that it is applied to."""
        return f"{self.name}_{self.location}"

    def __str__(self) -> str:
        return f"{self.name} ({self.type}, {self.location})"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    """Everything that a compressed-tensors block says, with defaults filled in and aliases resolved.

    `origin` names file and key that the block came from.
    `directory` is the one that was read, None for a dictionary.
    `modifiers` are the names of the modifiers in `recipe.yaml` beside the weights (`AWQModifier`, ...).
    `qk_rows` is this package's own key, by which a user says what Mistral's own form leaves open (`plan/row_order.py`).
    `warnings` are things that were read, have no effect here and may surprise: unknown keys above all.
    """

    groups: tuple[ConfigGroup, ...]
    ignore: tuple[str, ...] = ()
    format: CompressionFormat | None = None
    kv_cache_scheme: QuantArgs | None = None
    sparsity: SparsityConfig | None = None
    expert_sparsity: ExpertSparsity | None = None
    transforms: tuple[Transform, ...] = ()
    quantization_status: str | None = None
    qk_rows: RowOrder | None = None
    version: str | None = None
    origin: str = "quantization_config"
    directory: Path | None = None
    modifiers: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def release(self) -> tuple[int, ...]:
        """Major, minor and patch of the release that wrote the block, () when nothing says it.

        Up to 0.6 the block had a key of its own and no version. Releases 0.7 to 0.10.2 lost theirs on saving.
        """
        if self.version is None:
            return _LAST_COMPRESSION_CONFIG if self.origin.endswith("compression_config") else ()
        numbers = [int(part) for part in re.findall(r"\d+", self.version)[:3]]
        return (*numbers, *(0,) * (3 - len(numbers))) if numbers else ()
