"""The quantization configuration of a checkpoint as frozen values.

`trtllm_ct.config.reader` converts the JSON: code that uses these values sees no raw dictionary, no alias and no missing
default.
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
    """The `sparsity_config` block of releases 0.4 to 0.14, for checkpoints that have sparse weights."""

    format: CompressionFormat
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    sparsity_structure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSparsity:
    """The `moe_sparsity_config` block: the number of experts in each decoder layer, after some were removed.

    The experts of a layer are renumbered from 0. `num_experts` is None for a dense layer.
    """

    method: str
    num_experts: tuple[int | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """One `apply` entry of `transform_config`: a rotation, its location and its targets.

    `precision` is the torch name of the dtype in which online rotations are computed.
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
        """Whether the rotation is computed at run time; any other one is already part of the stored weights."""
        return not self.location.startswith("weight_")

    @property
    def hadamard(self) -> bool:
        """Whether the matrix is a Hadamard matrix, which is stored without the factor 1 / sqrt(n)."""
        return self.type != "random-matrix"

    @property
    def permuted(self) -> bool:
        """Whether rows and columns of the matrix are reordered by a stored permutation."""
        return self.randomize and self.hadamard

    @property
    def module(self) -> str:
        """The name of the module that holds the matrix, a child of the module to which it is applied."""
        return f"{self.name}_{self.location}"

    def __str__(self) -> str:
        return f"{self.name} ({self.type}, {self.location})"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    """The content of a compressed-tensors block, with defaults filled in and aliases resolved.

    `origin` names the file and key of the block.
    `directory` is the checkpoint directory; None when a dictionary was read.
    `modifiers` are the names of the modifiers in `recipe.yaml` beside the weights (`AWQModifier`, ...).
    `qk_rows` is a key of this package. With it, a user states the row order of queries and keys, which Mistral's own
    form leaves open (`plan/row_order.py`).
    `warnings` report what was read, has no effect here and may surprise the user, above all unknown keys.
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
        """Major, minor and patch number of the release that wrote the block; () when it is unknown.

        Up to 0.6 the block had no version, but a key of its own (`compression_config`), so 0.6.0 is returned for it.
        Releases 0.7 to 0.10.2 lost their version on saving.
        """
        if self.version is None:
            return _LAST_COMPRESSION_CONFIG if self.origin.endswith("compression_config") else ()
        numbers = [int(part) for part in re.findall(r"\d+", self.version)[:3]]
        return (*numbers, *(0,) * (3 - len(numbers))) if numbers else ()
