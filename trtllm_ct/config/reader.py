"""Read the compressed-tensors block of a checkpoint as a `QuantizationConfig`.

An unknown key gives a warning; a value whose meaning is unknown is an error. All faults of a block are raised together,
each with its JSON path. The reader accepts whatever the library knows; the plan decides whether a scheme can be loaded.
Sources: compressed-tensors 0.4 to 0.20 quantization/quant_config.py, and transformers utils/quantization_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import ConfigError
from trtllm_ct.base.schemes import CompressionFormat, RowOrder
from trtllm_ct.config.arguments import read_activation_args
from trtllm_ct.config.detect import Detection, FormatDetector, unwrap_block
from trtllm_ct.config.groups import read_groups
from trtllm_ct.config.json_object import Findings, JsonObject
from trtllm_ct.config.quantization_config import ConfigGroup, QuantizationConfig
from trtllm_ct.config.recipe import read_modifiers
from trtllm_ct.config.sparsity_config import read_expert_sparsity, read_sparsity
from trtllm_ct.config.transform_config import read_transforms

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["CompressedTensorsConfigReader"]

_BLOCK_KEYS = (
    "quant_method",
    "version",
    "format",
    "config_groups",
    "ignore",
    "kv_cache_scheme",
    "quantization_status",
    "sparsity_config",
    "transform_config",
    "moe_sparsity_config",
    "qk_rows",
)
# Runtime switches, statistics, and keys that only other engines use. They have no effect on stored tensors.
_IGNORED_KEYS = (
    "global_compression_ratio",
    "run_compressed",
    "dequantize",
    "use_optimized_inference",
    "packed_modules_mapping",
    "linear_fp8_config",
    "total_num_heads",
    "total_num_kv_heads",
    "registry_requires_subclass",
)
# A dictionary with one of these keys is a block; no config.json has them at its top level.
_BLOCK_MARKERS = ("quant_method", "config_groups", "sparsity_config", "kv_cache_scheme")
# A block with one of these keys needs no groups: the checkpoint is only sparse, only rotated, or has only a quantized
# KV cache.
_SUFFICIENT_WITHOUT_GROUPS = ("sparsity_config", "kv_cache_scheme", "transform_config")


class CompressedTensorsConfigReader:
    """Reads the compressed-tensors configuration of a directory, of a config.json or of the block alone."""

    def read(self, source: str | Path | Mapping[str, Any] | Detection) -> QuantizationConfig:
        """Read a checkpoint directory, the dictionary of a whole config.json, or the quantization block itself.

        A `Detection` stands for the directory that it was made from, whose JSON files are not read again.

        The modifiers that made the checkpoint (`recipe.yaml`) are known only for a directory or its detection.
        Raises `DetectionError` when there is no compressed-tensors block; the message says what was found instead.
        Raises `ConfigError` with every fault of a block that can't be read.
        """
        if isinstance(source, Mapping):
            block, origin = _find_block(source)
            return _read_block(block, origin)
        detection = source if isinstance(source, Detection) else FormatDetector().detect(source)
        config = _read_block(detection.require_compressed_tensors(), detection.origin or "")
        if detection.source is None:
            return config
        return replace(config, directory=detection.source.folder, modifiers=read_modifiers(detection.source))


def _find_block(source: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Return the block in a dictionary, and its origin.

    A block without a method name is assumed to be a compressed-tensors block when it is passed alone.
    """
    if not any(key in source for key in _BLOCK_MARKERS):
        detection = FormatDetector().detect_config(source)
        return detection.require_compressed_tensors(), detection.origin or ""
    block = unwrap_block(source)
    if block.get("quant_method") is not None or "producer" in block:
        FormatDetector().detect_config({"quantization_config": block}).require_compressed_tensors()
    return block, "quantization_config"


def _read_block(block: Mapping[str, Any], origin: str) -> QuantizationConfig:
    root = JsonObject(block, origin, Findings())
    root.warn_unknown(_BLOCK_KEYS, _IGNORED_KEYS)
    declared_format = root.choice("format", CompressionFormat, None)
    version = root.hint("version")
    config = QuantizationConfig(
        groups=_read_groups(root, declared_format, version),
        ignore=root.patterns("ignore"),
        format=declared_format,
        kv_cache_scheme=read_activation_args(root.child("kv_cache_scheme")),
        sparsity=read_sparsity(root.child("sparsity_config")),
        expert_sparsity=read_expert_sparsity(root.child("moe_sparsity_config")),
        transforms=read_transforms(root.child("transform_config")),
        quantization_status=root.hint("quantization_status"),
        qk_rows=root.choice("qk_rows", RowOrder, None),
        version=version,
        origin=origin,
        warnings=tuple(root.findings.warnings),
    )
    root.findings.collector.raise_if_any(ConfigError)
    return config


def _read_groups(
    root: JsonObject,
    declared_format: CompressionFormat | None,
    version: str | None,
) -> tuple[ConfigGroup, ...]:
    """Read `config_groups`; records a fault when it is missing and no other key makes up for it."""
    groups = root.child("config_groups")
    if groups is not None:
        return read_groups(groups, global_format=declared_format, version=version)
    if root.raw.get("config_groups") is None and not any(root.raw.get(key) for key in _SUFFICIENT_WITHOUT_GROUPS):
        root.fault(
            "config_groups",
            expected="a JSON object that says how modules are quantized",
            remedy="The block says nothing about weights; take config.json from where the checkpoint was published.",
        )
    return ()
