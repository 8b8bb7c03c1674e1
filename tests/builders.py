"""Tiny compressed-tensors checkpoints, written without the library that the format comes from.

`write_checkpoint(directory, scheme="int4-g32")` gives a model directory and, beside it, what its weights are worth:
the exact value of every element, computed here by arithmetic that shares no code with the package under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import oracles
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trtllm_ct.dtypes import DType
from trtllm_ct.schemes import Packing

if TYPE_CHECKING:
    from pathlib import Path

Edit = Callable[[dict[str, Tensor]], object]

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def tiny_config(
    architecture: str = "LlamaForCausalLM",
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 128,
    vocabulary: int = 96,
    dtype: str = "bfloat16",
    tied: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """A config.json as transformers 5 writes it; `more` are further keys, None among them leaves a key out."""
    config = {
        "architectures": [architecture],
        "model_type": ARCHITECTURES.get(architecture, "llama"),
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "use_cache": True,
        "dtype": dtype,
        "transformers_version": "5.23.0",
    }
    return {key: value for key, value in (config | more).items() if value is not None}


def int_weights(
    bits: int = 4, strategy: str = "group", group_size: int | None = 32, symmetric: bool = True, **more: Any
) -> dict[str, Any]:
    """Arguments of integer weights; `group_size` counts for strategy group only."""
    size = group_size if strategy == "group" else None
    return _arguments("int", bits, strategy) | {"symmetric": symmetric, "group_size": size} | more


def fp8_weights(strategy: str = "tensor", **more: Any) -> dict[str, Any]:
    """Arguments of fp8 weights."""
    return _arguments("float", 8, strategy) | more


def fp8_inputs(strategy: str = "tensor", **more: Any) -> dict[str, Any]:
    """Arguments of fp8 activations: static per tensor, or dynamic per token."""
    return _arguments("float", 8, strategy) | {"dynamic": strategy == "token"} | more


def _arguments(number: str, bits: int, strategy: str) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": number,
        "symmetric": True,
        "strategy": strategy,
        "group_size": None,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def config_group(
    weights: Mapping[str, Any] | None,
    inputs: Mapping[str, Any] | None = None,
    *,
    targets: Sequence[str] = ("Linear",),
    **more: Any,
) -> dict[str, Any]:
    """One entry of `config_groups`."""
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        **more,
    }


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How the Linears of one config group are stored."""

    weights: dict[str, Any]
    inputs: dict[str, Any] | None = None
    format: str = "pack-quantized"

    @property
    def group(self) -> dict[str, Any]:
        return config_group(self.weights, self.inputs, format=self.format)


SCHEMES: dict[str, Scheme] = {
    **{f"int4-g{size}": Scheme(weights=int_weights(4, group_size=size)) for size in (16, 32, 64, 128, 256)},
    **{
        f"int4-g{size}-asym": Scheme(weights=int_weights(4, group_size=size, symmetric=False)) for size in (32, 64, 128)
    },
    "int4-channel": Scheme(weights=int_weights(4, "channel")),
    "int4-channel-asym": Scheme(weights=int_weights(4, "channel", symmetric=False)),
    "int4-tensor": Scheme(weights=int_weights(4, "tensor")),
    "int4-plain-g64": Scheme(weights=int_weights(4, group_size=64), format="int-quantized"),
    "int8-channel": Scheme(weights=int_weights(8, "channel")),
    "int8-channel-asym": Scheme(weights=int_weights(8, "channel", symmetric=False)),
    "int8-g32": Scheme(weights=int_weights(8, group_size=32)),
    "int8-plain-tensor": Scheme(weights=int_weights(8, "tensor"), format="int-quantized"),
    "int8-plain-channel": Scheme(weights=int_weights(8, "channel"), format="int-quantized"),
    "int8-plain-channel-asym": Scheme(weights=int_weights(8, "channel", symmetric=False), format="int-quantized"),
    "int8-plain-g32": Scheme(weights=int_weights(8, group_size=32), format="int-quantized"),
    "fp8-tensor-static": Scheme(weights=fp8_weights("tensor"), inputs=fp8_inputs("tensor"), format="float-quantized"),
    "fp8-tensor-naive": Scheme(weights=fp8_weights("tensor"), inputs=fp8_inputs("tensor"), format="naive-quantized"),
    "fp8-channel-token": Scheme(weights=fp8_weights("channel"), inputs=fp8_inputs("token"), format="float-quantized"),
}
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
    names = {module: _scheme_of(module, scheme) for module, _, _ in _linears(config)}
    config.setdefault("quantization_config", _block(names, scheme, kv=kv))
    model = _Model(DType.from_torch(config["dtype"]).torch_dtype, scale_dtype, torch.Generator().manual_seed(seed))
    model.fill(config, names, kv=kv)
    if edit is not None:
        edit(model.stored)
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", config)
    _write_shards(directory, _split(model.stored, shards))
    if tokenizer:
        write_tokenizer(directory, int(config["vocab_size"]))
    return Built(directory=directory, config=config, dense=model.dense, stored=model.stored)


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


def _linears(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, int], bool]]:
    """Name, (N, K) and whether there is a bias, of every Linear in the order of the model."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    kv_heads = config["num_key_value_heads"] * config["head_dim"]
    attention_bias = bool(config.get("attention_bias"))
    qkv_bias = attention_bias or config["model_type"] == "qwen2"
    mlp_bias = bool(config.get("mlp_bias"))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj", (heads, hidden), qkv_bias
        yield f"{prefix}.self_attn.k_proj", (kv_heads, hidden), qkv_bias
        yield f"{prefix}.self_attn.v_proj", (kv_heads, hidden), qkv_bias
        yield f"{prefix}.self_attn.o_proj", (hidden, heads), attention_bias
        yield f"{prefix}.mlp.gate_proj", (inner, hidden), mlp_bias
        yield f"{prefix}.mlp.up_proj", (inner, hidden), mlp_bias
        yield f"{prefix}.mlp.down_proj", (hidden, inner), mlp_bias
    if not config["tie_word_embeddings"]:
        yield "lm_head", (config["vocab_size"], hidden), False


def _norms(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm", config["hidden_size"]
        yield f"{prefix}.post_attention_layernorm", config["hidden_size"]
        if config["model_type"] == "qwen3":
            yield f"{prefix}.self_attn.q_norm", config["head_dim"]
            yield f"{prefix}.self_attn.k_norm", config["head_dim"]
    yield "model.norm", config["hidden_size"]


def _scheme_of(module: str, scheme: str | Mapping[str, str]) -> str:
    if isinstance(scheme, str):
        return DENSE if module == "lm_head" else scheme
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


class _Model:
    """Fills `stored` and `dense` with a random model, tensor by tensor."""

    def __init__(self, dtype: torch.dtype, scale_dtype: torch.dtype | None, generator: torch.Generator) -> None:
        self.stored: dict[str, Tensor] = {}
        self.dense: dict[str, Tensor] = {}
        self._dtype = dtype
        self._scale_dtype = scale_dtype or dtype
        self._generator = generator

    def fill(self, config: Mapping[str, Any], names: Mapping[str, str], *, kv: bool) -> None:
        self._plain("model.embed_tokens.weight", self._normal(config["vocab_size"], config["hidden_size"]))
        for module, size in _norms(config):
            self._plain(f"{module}.weight", 1 + 0.1 * self._normal(size))
        for module, shape, has_bias in _linears(config):
            if names[module] == DENSE:
                self._plain(f"{module}.weight", self._normal(*shape) / sqrt(shape[1]))
            else:
                self._quantized(module, shape, SCHEMES[names[module]])
            if has_bias:
                self._plain(f"{module}.bias", 0.1 * self._normal(shape[0]))
        if kv:
            for layer in range(config["num_hidden_layers"]):
                for local in ("k_scale", "v_scale"):
                    self.stored[f"model.layers.{layer}.self_attn.{local}"] = self._scales(1, size=0.02)

    def _plain(self, name: str, values: Tensor) -> None:
        self.stored[name] = values.to(self._dtype)
        self.dense[name] = self.stored[name].double()

    def _quantized(self, module: str, shape: tuple[int, int], scheme: Scheme) -> None:
        args = scheme.weights
        float8 = args["type"] == "float"
        top = 448 if float8 else 2 ** (args["num_bits"] - 1) - 1
        # Codes spread over three standard deviations, weights like those of a fresh Linear.
        scale = self._scales(*_scale_shape(args, shape), size=3 / top / sqrt(shape[1]))
        zero_point = None if args["symmetric"] else self._integers(-top - 1, top, *scale.shape)
        spread = (self._normal(*shape) * top / 3).clamp(-top - (not float8), top)
        codes = spread.to(torch.float8_e4m3fn) if float8 else spread.round().to(torch.int8)
        tensors = _float8(codes, scale) if float8 else _integers(scheme, codes, scale, zero_point)
        if scheme.inputs is not None and not scheme.inputs["dynamic"]:
            tensors["input_scale"] = self._scales(1, size=0.02)
        self.stored |= {f"{module}.{local}": tensor for local, tensor in tensors.items()}
        self.dense[f"{module}.weight"] = exact_values(codes, scale, zero_point)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def _integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self._generator, dtype=torch.int8)

    def _scales(self, *shape: int, size: float) -> Tensor:
        return (size * (0.5 + torch.rand(shape, generator=self._generator))).to(self._scale_dtype)


def exact_values(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """(code - zero point) * scale of every element in float64, which holds such products exactly.

    `scale` is [1] or [N, G] with G groups of equal size; `zero_point` has its shape.
    """
    rows, columns = codes.shape
    groups = scale.reshape(-1, scale.shape[-1]).shape[1]
    group = np.arange(columns) // (columns // groups)
    zeros = torch.zeros_like(scale) if zero_point is None else zero_point
    wide_scale = np.broadcast_to(scale.double().reshape(-1, groups).numpy()[:, group], (rows, columns))
    wide_zero = np.broadcast_to(zeros.double().reshape(-1, groups).numpy()[:, group], (rows, columns))
    return torch.from_numpy((codes.double().numpy() - wide_zero) * wide_scale)


def _scale_shape(args: Mapping[str, Any], shape: tuple[int, int]) -> tuple[int, ...]:
    rows, columns = shape
    if args["strategy"] == "tensor":
        return (1,)
    groups, rest = divmod(columns, args["group_size"] or columns)
    if rest or not groups:
        raise ValueError(f"groups of {args['group_size']} don't divide {columns} columns")
    return rows, groups


def _float8(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    return {"weight": codes, "weight_scale": scale}


def _integers(scheme: Scheme, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> dict[str, Tensor]:
    """Integer codes as `int-quantized` or `pack-quantized` stores them."""
    if scheme.format == "int-quantized":
        plain = {"weight": codes, "weight_scale": scale}
        return plain if zero_point is None else plain | {"weight_zero_point": zero_point}
    bits = scheme.weights["num_bits"]
    tensors = {
        "weight_packed": oracles.pack(codes.long().numpy(), _words(bits, axis=1)),
        "weight_scale": scale,
        "weight_shape": torch.tensor(codes.shape),
    }
    if zero_point is not None:
        packed = zero_point if scale.dim() == 1 else oracles.pack(zero_point.long().numpy(), _words(bits, axis=0))
        tensors["weight_zero_point"] = packed
    return tensors


def _words(bits: int, *, axis: int) -> Packing:
    return Packing(bits=bits, container=DType.I32, axis=1 if axis else 0, offset_binary=True)


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
