"""What the Linears of a converted directory hold, read without the package under test: numpy and the stored bytes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["PLAIN", "decoded_weight", "delivered_modes", "delivered_tensors", "rounded_once"]

PLAIN = "plain"
"""The mode of a module without scales."""

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float64)
_PRECISION = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}


def delivered_tensors(directory: Path) -> dict[str, Tensor]:
    """Return every tensor of a directory by name."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def delivered_modes(directory: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the mode that an engine reads each module with a weight in; fails where the tensors speak against it.

    A module is quantized exactly when it has a scale, and then it has an entry, or is not excluded from the global
    algorithm. Experts can be excluded all at once.
    """
    path = directory / "hf_quant_config.json"
    document: dict[str, Any] = json.loads(path.read_text())["quantization"] if path.exists() else {}
    entries, excluded = document.get("quantized_layers") or {}, set(document.get("exclude_modules") or ())
    whole = document.get("quant_algo")
    modes = {}
    for name in tensors:
        module, _, local = name.rpartition(".")
        if local != "weight" or tensors[name].dim() != 2:
            continue
        algo = entries.get(module, {}).get("quant_algo") if whole == "MIXED_PRECISION" else whole
        scaled = any(f"{module}.{scale}" in tensors for scale in ("weight_scale", "weight_scale_inv"))
        names = {module, module.partition(".experts.")[0] + ".experts"}
        assert scaled == (algo is not None and not names & excluded), f"{module} would be read in {algo}"
        modes[module] = str(algo) if scaled else PLAIN
    return modes


def decoded_weight(mode: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the weight [N, K] of one module in float64, from its tensors by local name."""
    return torch.from_numpy(_DECODERS[mode](tensors))


def rounded_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the nearest values of a dtype, with ties to even, in float64; for values far from its limits."""
    _, exponent = torch.frexp(exact)
    spacing = torch.exp2((exponent - _PRECISION[dtype]).double())
    return torch.round(exact / spacing) * spacing


def _array(tensor: Tensor) -> Any:
    return tensor.double().numpy()


def _plain(tensors: Mapping[str, Tensor]) -> Any:
    return _array(tensors["weight"])


def _rows(tensors: Mapping[str, Tensor]) -> Any:
    return _array(tensors["weight"]) * _array(tensors["weight_scale"]).reshape(-1, 1)


def _blocks(tensors: Mapping[str, Tensor]) -> Any:
    codes = _array(tensors["weight"])
    scale = _array(tensors["weight_scale"] if "weight_scale" in tensors else tensors["weight_scale_inv"])
    scale = scale.reshape(-(-codes.shape[0] // 128), -(-codes.shape[1] // 128))
    return codes * scale[np.ix_(np.arange(codes.shape[0]) // 128, np.arange(codes.shape[1]) // 128)]


def _int4_groups(tensors: Mapping[str, Tensor]) -> Any:
    """Byte (i, k) holds row 2i in its low half and row 2i + 1 in its high half."""
    assert (tensors.get("pre_quant_scale", torch.ones(1)) == 1).all()
    packed = tensors["weight"].view(torch.uint8).numpy()
    fields = np.empty((2 * packed.shape[0], packed.shape[1]))
    fields[0::2], fields[1::2] = packed % 16, packed // 16
    scale = _array(tensors["weight_scale"])
    return np.where(fields < 8, fields, fields - 16) * scale.repeat(fields.shape[1] // scale.shape[1], axis=1)


def _nvfp4(tensors: Mapping[str, Tensor]) -> Any:
    """Byte (n, i) holds column 2i in its low half and column 2i + 1 in its high half."""
    packed = tensors["weight"].view(torch.uint8).numpy()
    fields = np.empty((packed.shape[0], 2 * packed.shape[1]), dtype=np.int64)
    fields[:, 0::2], fields[:, 1::2] = packed % 16, packed // 16
    values = _E2M1[fields % 8] * np.where(fields < 8, 1, -1)
    return values * _array(tensors["weight_scale"]).repeat(16, axis=1) * _array(tensors["weight_scale_2"])


_DECODERS: Mapping[str, Callable[[Mapping[str, Tensor]], Any]] = {
    PLAIN: _plain,
    "W8A16": _rows,
    "FP8_PER_CHANNEL_PER_TOKEN": _rows,
    "FP8_BLOCK_SCALES": _blocks,
    "W4A16_AWQ": _int4_groups,
    "NVFP4": _nvfp4,
}
