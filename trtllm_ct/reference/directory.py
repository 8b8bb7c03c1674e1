"""Where the tensors of a directory come from: read as they are, or delivered by the `reference` target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import ConfigError, DetectionError, Fault
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.checkpoint.reader import TensorReader
from trtllm_ct.config.detect import FormatDetector
from trtllm_ct.config.json_file import read_json_object
from trtllm_ct.config.quant_methods import COMPRESSED_TENSORS, MODELOPT, describe_method
from trtllm_ct.engine.quant_config import QuantConfig
from trtllm_ct.reference.linear_layouts import LAYOUTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

__all__ = ["ModelSource", "model_dtype", "read_directory", "read_quant_config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """What a model is built of: a parsed config.json, its quantization and a stream of delivered tensors."""

    config: Mapping[str, Any]
    quant_config: QuantConfig | None
    tensors: Iterable[tuple[str, Tensor]]


def read_directory(directory: Path, *, dtype: torch.dtype) -> ModelSource:
    """Open a compressed-tensors, ModelOpt or unquantized directory.

    `dtype` is that of the modules which a compressed-tensors checkpoint has to dequantize.
    Raises `DetectionError` for a checkpoint of another quantization method, `ConfigError` for JSON that can't be read.
    """
    detection = FormatDetector().detect(directory)
    if detection.method == COMPRESSED_TENSORS:
        from trtllm_ct.reference.bridge import deliver

        delivered = deliver(directory, dtype=dtype)
        return ModelSource(config=delivered.config, quant_config=delivered.quant_config, tensors=delivered.tensors)
    if detection.method not in {MODELOPT, None}:
        raise DetectionError(
            Fault(
                where=str(directory),
                expected="a compressed-tensors, ModelOpt or unquantized checkpoint",
                found=detection.description,
                remedy=describe_method(detection.method).remedy,
            )
        )
    config = read_json_object(directory / "config.json")
    catalog = Catalog.from_directory(directory)
    path = directory / "hf_quant_config.json"
    quant_config = read_quant_config(path, catalog) if detection.method == MODELOPT else None
    return ModelSource(config=config, quant_config=quant_config, tensors=_read_tensors(catalog))


def model_dtype(directory: Path) -> torch.dtype:
    """The dtype that config.json says its model computes in, under its new or old name; bfloat16 without one."""
    config = read_json_object(directory / "config.json")
    text = config.get("text_config")
    blocks = (text, config) if isinstance(text, dict) else (config,)
    stated = (block[key] for block in blocks for key in ("dtype", "torch_dtype") if block.get(key))
    return DType.from_torch(next(stated, "bfloat16")).torch_dtype


def _read_tensors(catalog: Catalog) -> Iterator[tuple[str, Tensor]]:
    with TensorReader(catalog) as reader:
        for name in catalog.tensors:
            yield name, reader.read(name)


def read_quant_config(path: Path, catalog: Catalog) -> QuantConfig:
    """The `quantization` part of a ModelOpt directory, excluded modules by their full names."""
    content = read_json_object(path)
    try:
        quant_config = QuantConfig.from_dict(content["quantization"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            Fault(
                where=str(path),
                expected=f"`quantization` with a quant_algo among {', '.join(LAYOUTS)}",
                found=f"{type(error).__name__}: {error}",
                remedy="The reference engine computes these algorithms only; quantize or convert to one of them.",
            )
        ) from None
    excluded = _excluded_modules(quant_config.exclude_modules, catalog.tensors)
    return replace(quant_config, exclude_modules=excluded)


def _excluded_modules(patterns: Iterable[str], tensor_names: Iterable[str]) -> tuple[str, ...]:
    """Modules that a pattern matches, by their own name or that of a module around them; then the patterns themselves.

    Source: TensorRT-LLM `models/modeling_utils.py`, `QuantConfig.is_module_excluded_from_quantization`.
    """
    patterns = tuple(patterns)
    modules = dict.fromkeys(name.rpartition(".")[0] for name in tensor_names)
    matching = (
        module
        for module in modules
        if any(fnmatchcase(ancestor, pattern) for ancestor in _with_ancestors(module) for pattern in patterns)
    )
    return tuple(dict.fromkeys((*matching, *patterns)))


def _with_ancestors(module: str) -> Iterator[str]:
    return accumulate(module.split("."), "{}.{}".format)
