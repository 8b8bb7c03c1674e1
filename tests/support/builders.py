"""Tiny compressed-tensors checkpoints, written without the library that the format comes from.

`write_checkpoint(directory, scheme="int4-g32")` gives a model directory and, beside it, what its weights are worth:
the exact value of every element, computed here by arithmetic that shares no code with the package under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from stored_schemes import SCHEMES, Writer, config_group, exact_values, fp8_inputs, fp8_weights, int_weights
from tiny_models import linears, never_quantized, norms, score_corrections, tiny_config
from torch import Tensor

from trtllm_ct.base.dtypes import DType

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "DENSE",
    "SCHEMES",
    "Built",
    "config_group",
    "exact_values",
    "fp8_inputs",
    "fp8_weights",
    "int_weights",
    "quantization_block",
    "rewrite",
    "rewrite_config",
    "tiny_config",
    "write_checkpoint",
    "write_tokenizer",
]

Edit = Callable[[dict[str, Tensor]], object]


def quantization_block(
    groups: Mapping[str, Any],
    ignore: Sequence[str] = ("lm_head",),
    format: str = "pack-quantized",  # noqa: A002 (the name of the key)
    kv: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """A `quantization_config` as release 0.20 writes it; `groups` by name, see `config_group`."""
    return {
        "quant_method": "compressed-tensors",
        "version": "0.20.0",
        "format": format,
        "config_groups": dict(groups),
        "ignore": list(ignore),
        "kv_cache_scheme": fp8_weights("tensor") if kv else None,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "moe_sparsity_config": None,
    } | more


DENSE = "dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A checkpoint on disk and the truth about it.

    `dense` holds the exact value of every weight, bias, norm and embedding in float64, under the names of a plain
    model; `stored` the tensors as they were saved, after any edit.
    """

    directory: Path
    config: dict[str, Any]
    dense: dict[str, Tensor]
    stored: dict[str, Tensor]

    def state_dict(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """`dense` as a plain model of another dtype; not for float16 and bfloat16, to which torch rounds twice."""
        return {name: tensor.to(dtype) for name, tensor in self.dense.items()}


def write_checkpoint(
    directory: Path,
    *,
    config: Mapping[str, Any] | None = None,
    scheme: str | Mapping[str, str] = "int4-g32",
    kv: bool = False,
    scale_dtype: torch.dtype | None = None,
    seed: int = 0,
    shards: int = 1,
    tokenizer: bool = False,
    edit: Edit | None = None,
) -> Built:
    """Write a random model of `config` (`tiny_config()` when None) whose Linears are stored by `scheme`.

    `scheme` is a name of `SCHEMES`, `dense`, or a mapping of module leaves (`q_proj`) or full module names to such
    names; modules that it leaves out are dense, and so is lm_head unless it is named. Scales have the model's dtype
    unless `scale_dtype` says otherwise. `kv` adds KV-cache scales. `edit` changes the tensors before they are saved,
    in place. A `quantization_config` in `config` is kept instead of the one that fits.
    """
    config = dict(config or tiny_config())
    names = {module: _scheme_of(module, scheme) for module, _, _ in linears(config)}
    config.setdefault("quantization_config", _block(names, scheme, kv=kv))
    stored, dense = _model(json.dumps(config), tuple(names.items()), scale_dtype, seed, kv=kv).copies()
    if edit is not None:
        edit(stored)
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", config)
    _write_shards(directory, _split(stored, shards))
    if tokenizer:
        write_tokenizer(directory, int(config["vocab_size"]))
    return Built(directory=directory, config=config, dense=dense, stored=stored)


def rewrite(directory: Path, edit: Edit) -> None:
    """Change the tensors of a directory in place; each stays in its shard, new ones go to the first."""
    shards = {path.name: load_file(path) for path in sorted(directory.glob("*.safetensors"))}
    home = {name: shard for shard, tensors in shards.items() for name in tensors}
    # Loaded tensors may share memory with the mapped file that is about to be replaced.
    stored = {name: tensor.clone() for tensors in shards.values() for name, tensor in tensors.items()}
    edit(stored)
    first = next(iter(shards))
    kept: dict[str, dict[str, Tensor]] = {shard: {} for shard in shards}
    for name, tensor in stored.items():
        kept[home.get(name, first)][name] = tensor
    _write_shards(directory, kept)


def rewrite_config(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change config.json of a directory in place."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    edit(config)
    _write_json(path, config)


def _scheme_of(module: str, scheme: str | Mapping[str, str]) -> str:
    if isinstance(scheme, str):
        return DENSE if never_quantized(module) else scheme
    return scheme.get(module, scheme.get(module.rpartition(".")[2], DENSE))


def _block(names: Mapping[str, str], scheme: str | Mapping[str, str], *, kv: bool) -> dict[str, Any]:
    """The block for these modules: one group of all Linears, or one group of named modules for each scheme."""
    ignore = [module for module, name in names.items() if name == DENSE] or ["lm_head"]
    if isinstance(scheme, str):
        groups = {} if scheme == DENSE else {"group_0": SCHEMES[scheme].group}
    else:
        used = sorted(set(names.values()) - {DENSE})
        groups = {
            f"group_{i}": SCHEMES[name].group | {"targets": [module for module in names if names[module] == name]}
            for i, name in enumerate(used)
        }
    formats = {group["format"] for group in groups.values()}
    return quantization_block(groups, ignore, formats.pop() if len(formats) == 1 else "mixed-precision", kv)


@lru_cache(maxsize=32)
def _model(
    config: str, names: tuple[tuple[str, str], ...], scale_dtype: torch.dtype | None, seed: int, *, kv: bool
) -> _Model:
    """A random model of a config.json. Many tests in a row start from the same one, which takes long to compute."""
    values = json.loads(config)
    model = _Model(DType.from_torch(values["dtype"]).torch_dtype, scale_dtype, torch.Generator().manual_seed(seed))
    model.fill(values, dict(names), kv=kv)
    return model


class _Model:
    """Fills `stored` and `dense` with a random model, tensor by tensor."""

    def __init__(self, dtype: torch.dtype, scale_dtype: torch.dtype | None, generator: torch.Generator) -> None:
        self.stored: dict[str, Tensor] = {}
        self.dense: dict[str, Tensor] = {}
        self._dtype = dtype
        self._writer = Writer(scale_dtype or dtype, generator)

    def fill(self, config: Mapping[str, Any], names: Mapping[str, str], *, kv: bool) -> None:
        normal = self._writer.normal
        self._plain("model.embed_tokens.weight", normal(config["vocab_size"], config["hidden_size"]))
        for module, size in norms(config):
            self._plain(f"{module}.weight", 1 + 0.1 * normal(size))
        for module, shape, has_bias in linears(config):
            if names[module] == DENSE:
                self._plain(f"{module}.weight", normal(*shape) / sqrt(shape[1]))
            else:
                tensors, exact = self._writer.store(SCHEMES[names[module]], shape)
                self.stored |= {f"{module}.{local}": tensor for local, tensor in tensors.items()}
                self.dense[f"{module}.weight"] = exact
            if has_bias:
                self._plain(f"{module}.bias", 0.1 * normal(shape[0]))
        for name, size in score_corrections(config):
            self.stored[name] = 0.1 * normal(size)
            self.dense[name] = self.stored[name].double()
        if kv:
            for layer in range(config["num_hidden_layers"]):
                for local in ("k_scale", "v_scale"):
                    self.stored[f"model.layers.{layer}.self_attn.{local}"] = self._writer.scales(1, size=0.02)

    def copies(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`stored` and `dense` for a test, which may change them."""
        stored, dense = ({name: tensor.clone() for name, tensor in side.items()} for side in (self.stored, self.dense))
        return stored, dense

    def _plain(self, name: str, values: Tensor) -> None:
        self.stored[name] = values.to(self._dtype)
        self.dense[name] = self.stored[name].double()


def _split(stored: Mapping[str, Tensor], shards: int) -> dict[str, dict[str, Tensor]]:
    """Runs of tensors of about equal number, by file name; the companions of a weight may part."""
    if shards == 1:
        return {"model.safetensors": dict(stored)}
    names = list(stored)
    bounds = [len(names) * i // shards for i in range(shards + 1)]
    return {
        f"model-{i + 1:05}-of-{shards:05}.safetensors": {
            name: stored[name] for name in names[bounds[i] : bounds[i + 1]]
        }
        for i in range(shards)
    }


def _write_shards(directory: Path, shards: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Files, and an index when there are several."""
    for name, tensors in shards.items():
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, directory / name, metadata={"format": "pt"})
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
        weight_map = {key: name for name, tensors in shards.items() for key in tensors}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """One token a printable character, after the two special ones; any other character reads as the first."""
    words = ["<s>", "</s>", *(chr(code) for code in range(32, 127))][:vocabulary]
    special = [
        {
            "id": i,
            "content": words[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i in range(2)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<s>"},
    }
    _write_json(directory / "tokenizer.json", tokenizer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    _write_json(directory / "tokenizer_config.json", names)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
