"""Read a model directory: its config.json, its quantization and its tensors.

Tensors of ModelOpt and unquantized directories are read as they are stored. Those of a compressed-tensors directory are
delivered by the `reference` target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import ConfigError, DetectionError, Fault, FaultCollector
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.checkpoint.reader import TensorReader
from trtllm_ct.config.detect import FormatDetector
from trtllm_ct.config.json_file import read_json_object
from trtllm_ct.config.model_values import check_model_values
from trtllm_ct.config.quant_methods import COMPRESSED_TENSORS, MODELOPT, describe_method
from trtllm_ct.engine.quant_config import read_quantization
from trtllm_ct.layouts.torch_tensors import tensor_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

    from trtllm_ct.config.detect import Detection
    from trtllm_ct.engine.quant_config import QuantConfig

__all__ = ["ModelSource", "detect_model", "model_dtype", "read_directory", "read_quant_config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """What `build_model` needs: the parsed config.json, the quantization (None if unquantized) and the tensors.

    `tensors` yields full names and delivered tensors, and can be read once.
    """

    config: Mapping[str, Any]
    quant_config: QuantConfig | None
    tensors: Iterable[tuple[str, Tensor]]


def detect_model(directory: Path) -> Detection:
    """Return the format of a directory that `read_directory` can open; reads its configuration only.

    Raises `DetectionError` for a directory without a model, and for another quantization method.
    """
    detection = FormatDetector().detect(directory)
    if detection.method not in {COMPRESSED_TENSORS, MODELOPT, None}:
        raise DetectionError(
            Fault(
                where=str(directory),
                expected="a compressed-tensors, ModelOpt or unquantized checkpoint",
                found=detection.description,
                remedy=describe_method(detection.method).remedy,
            )
        )
    return detection


def read_directory(directory: Path, *, dtype: torch.dtype) -> ModelSource:
    """Open a compressed-tensors, ModelOpt or unquantized directory.

    `dtype` is the dtype of the modules of a compressed-tensors checkpoint that have to be dequantized.
    Raises `DetectionError` for a checkpoint of another quantization method, `ConfigError` for JSON that can't be read
    and for values of config.json of a wrong type or out of all bounds.
    """
    detection = detect_model(directory)
    if detection.method == COMPRESSED_TENSORS:
        from trtllm_ct.reference.bridge import deliver

        delivered = deliver(directory, dtype=dtype, detection=detection)
        return ModelSource(config=delivered.config, quant_config=delivered.quant_config, tensors=delivered.tensors)
    config = read_json_object(directory / "config.json")
    faults = FaultCollector()
    check_model_values(config, faults, f"{directory}/config.json: ")
    faults.raise_if_any(ConfigError)
    catalog = Catalog.from_directory(directory)
    path = directory / "hf_quant_config.json"
    quant_config = read_quant_config(path, catalog) if detection.method == MODELOPT else None
    return ModelSource(config=config, quant_config=quant_config, tensors=_read_tensors(catalog))


def model_dtype(directory: Path) -> torch.dtype:
    """The dtype that config.json names for computation; bfloat16 if it names none.

    Reads `dtype`, then the older key `torch_dtype`; `text_config` is read before the outer config.
    """
    config = read_json_object(directory / "config.json")
    text = config.get("text_config")
    blocks = (text, config) if isinstance(text, dict) else (config,)
    dtype_names = (block[key] for block in blocks for key in ("dtype", "torch_dtype") if block.get(key))
    return DType.from_torch(next(dtype_names, "bfloat16")).torch_dtype


def _read_tensors(catalog: Catalog) -> Iterator[tuple[str, Tensor]]:
    with TensorReader(catalog) as reader:
        for name in catalog.tensors:
            yield name, tensor_of(reader.read(name))


def read_quant_config(path: Path, catalog: Catalog) -> QuantConfig:
    """Read the `quantization` block of a ModelOpt `hf_quant_config.json`.

    The patterns of `exclude_modules` are expanded to the full names of the modules of `catalog` that they match.
    Raises `ConfigError` when the block is missing or malformed, or names an algorithm that the engine doesn't know.
    """
    quant_config = read_quantization(read_json_object(path), path)
    excluded = _excluded_modules(quant_config.exclude_modules, catalog.tensors)
    return replace(quant_config, exclude_modules=excluded)


def _excluded_modules(patterns: Iterable[str], tensor_names: Iterable[str]) -> tuple[str, ...]:
    """The modules that a pattern matches, by their own name or by the name of an enclosing module; then the patterns.

    Source: TensorRT-LLM `models/modeling_utils.py`, `QuantConfig.is_module_excluded_from_quantization`.
    """
    patterns = tuple(patterns)
    # Most entries are names: an exclusion for each of a million modules must not be compared with each module.
    names = frozenset(patterns)
    wild = [pattern for pattern in patterns if any(character in pattern for character in "*?[")]
    modules = dict.fromkeys(name.rpartition(".")[0] for name in tensor_names)
    matching = (
        module
        for module in modules
        if any(
            ancestor in names or any(fnmatchcase(ancestor, pattern) for pattern in wild)
            for ancestor in _with_ancestors(module)
        )
    )
    return tuple(dict.fromkeys((*matching, *patterns)))


def _with_ancestors(module: str) -> Iterator[str]:
    """The names of all modules that enclose `module`, outermost first, and its own name last."""
    return accumulate(module.split("."), "{}.{}".format)
