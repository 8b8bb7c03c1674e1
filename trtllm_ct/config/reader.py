"""The compressed-tensors block of a checkpoint -> `QuantizationConfig`. JSON ends here.

Unknown keys are warned of; unknown meaning is an error. All faults of a block are raised together, each with
its JSON path. The reader reads whatever the library knows: whether a scheme can be loaded is the plan's business.
Sources: compressed-tensors 0.4 to 0.20 quantization/quant_config.py, and transformers utils/quantization_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trtllm_ct.base.errors import ConfigError
from trtllm_ct.base.schemes import CompressionFormat, RowOrder
from trtllm_ct.config.arguments import read_activation_args
from trtllm_ct.config.detect import FormatDetector, unwrap_block
from trtllm_ct.config.groups import read_groups
from trtllm_ct.config.json_object import Findings, JsonObject
from trtllm_ct.config.quantization_config import ConfigGroup, QuantizationConfig
from trtllm_ct.config.recipe import read_modifiers
from trtllm_ct.config.sparsity_config import read_expert_sparsity, read_sparsity
from trtllm_ct.config.transform_config import read_transforms

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
# Switches of a runtime, statistics, and what other engines keep for themselves: no effect on stored tensors.
_SILENT_KEYS = (
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
# A dictionary with one of these is a block itself; no config.json has them at its top level.
_MARKS_OF_A_BLOCK = ("quant_method", "config_groups", "sparsity_config", "kv_cache_scheme")
# Any of these without groups is a checkpoint of its own kind: sparse only, quantized KV cache only, rotated only.
_ENOUGH_WITHOUT_GROUPS = ("sparsity_config", "kv_cache_scheme", "transform_config")


class CompressedTensorsConfigReader:
    """Reads the compressed-tensors configuration of a directory, of a config.json or of the block alone."""

    def read(self, source: str | Path | Mapping[str, Any]) -> QuantizationConfig:
        """Read a checkpoint directory, the dictionary of a whole config.json, or the quantization block itself.

        Only a directory can tell which modifiers made the checkpoint (`recipe.yaml`).
        Raises `DetectionError` when there is no compressed-tensors block, saying what was found instead, and
        `ConfigError` with every fault when there is one that can't be read as meant.
        """
        if isinstance(source, Mapping):
            block, origin = _find_block(source)
            return _read_block(block, origin)
        detection = FormatDetector().detect(source)
        block = detection.require_compressed_tensors()
        directory = Path(source)
        config = _read_block(block, detection.origin or "")
        return replace(config, directory=directory, modifiers=read_modifiers(directory))


def _find_block(source: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The block in a dictionary, and its origin; a bare block without a method is taken at the caller's word."""
    if not any(mark in source for mark in _MARKS_OF_A_BLOCK):
        detection = FormatDetector().detect_config(source)
        return detection.require_compressed_tensors(), detection.origin or ""
    block = unwrap_block(source)
    if block.get("quant_method") is not None or "producer" in block:
        FormatDetector().detect_config({"quantization_config": block}).require_compressed_tensors()
    return block, "quantization_config"


def _read_block(block: Mapping[str, Any], origin: str) -> QuantizationConfig:
    root = JsonObject(block, origin, Findings())
    root.warn_unknown(_BLOCK_KEYS, _SILENT_KEYS)
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
    groups = root.child("config_groups")
    if groups is not None:
        return read_groups(groups, global_format=declared_format, version=version)
    if root.raw.get("config_groups") is None and not any(root.raw.get(key) for key in _ENOUGH_WITHOUT_GROUPS):
        root.fault(
            "config_groups",
            expected="a JSON object that says how modules are quantized",
            remedy="The block says nothing about weights; take config.json from where the checkpoint was published.",
        )
    return ()
