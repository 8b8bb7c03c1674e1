"""Synthetic checkpoints to measure on: Llama shapes with int4, FP8 or NVFP4 codes, and reproducible random values.

The values don't affect the measured times, as long as scales are finite and all codes occur. Each tensor is generated
from its name and the seed, one after another, so that writing needs the memory of one tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol
from zlib import crc32

from benchmarks.kimi import KimiShape
from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from typing_extensions import Self

    from trtllm_ct.layouts.stored_array import StoredArray

__all__ = ["DEFAULT_SHAPES", "SHAPES", "LlamaShape", "Shape", "random_tensor"]

_SHARD_BYTES = 5 * 10**9
# Random and fixed bits of bfloat16 numbers: a random mantissa and a fixed exponent.
_SMALL_POSITIVE = 0x007F, 0x3C00  # 2^-7 to 2^-6
_SMALL = 0x807F, 0x3C80  # 2^-6 to 2^-5, with a random sign
# The same of E4M3 numbers: no exponent of all ones, which NaN has.
_E4M3_POSITIVE = 0x07, 0x38  # 1 to 2
_E4M3 = 0xBF, 0x00  # below 2, with a random sign
_GLOBAL_SCALE = 2000.0
_ROW = -1


def _arguments(number: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    """Return the arguments of weights or activations in `config_groups`."""
    return {"num_bits": bits, "type": number, "symmetric": True, "strategy": strategy, **more}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scheme:
    """How the Linears of a checkpoint are stored: format, arguments, and the tensors of a Linear [rows, columns].

    `units` maps the local name of a tensor to its dtype and to the columns that share one element of it; a tensor with
    0 columns has a single element for the whole weight, one with `_ROW` an element for each row.
    """

    format: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None
    units: Mapping[str, tuple[DType, int]]
    with_shape: bool = False

    def specs(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """Return the tensors of a Linear by local name."""
        specs = {
            local: TensorSpec(dtype, _unit_shape(rows, columns, shared))
            for local, (dtype, shared) in self.units.items()
        }
        return {**specs, "weight_shape": TensorSpec(DType.I64, (2,))} if self.with_shape else specs


def _unit_shape(rows: int, columns: int, shared: int) -> tuple[int, ...]:
    """Return the shape of a tensor of a Linear; see `_Scheme.units`."""
    if shared == _ROW:
        return rows, 1
    return (rows, columns // shared) if shared else (1,)


_NVFP4 = _arguments("float", 4, "tensor_group", group_size=16)

SCHEMES: Mapping[str, _Scheme] = MappingProxyType(
    {
        "int4": _Scheme(
            format="pack-quantized",
            weights=_arguments("int", 4, "group", group_size=128),
            inputs=None,
            units={"weight_packed": (DType.I32, 8), "weight_scale": (DType.BF16, 128)},
            with_shape=True,
        ),
        "fp8": _Scheme(
            format="float-quantized",
            weights=_arguments("float", 8, "channel"),
            inputs=_arguments("float", 8, "token", dynamic=True),
            units={"weight": (DType.F8_E4M3, 1), "weight_scale": (DType.BF16, _ROW)},
        ),
        "nvfp4": _Scheme(
            format="nvfp4-pack-quantized",
            weights=_NVFP4,
            inputs={**_NVFP4, "dynamic": "local"},
            units={
                "weight_packed": (DType.U8, 2),
                "weight_scale": (DType.F8_E4M3, 16),
                "weight_global_scale": (DType.F32, 0),
                "input_global_scale": (DType.F32, 0),
            },
        ),
    }
)
"""The schemes that a `LlamaShape` can be stored in."""


class Shape(Protocol):
    """A synthetic checkpoint that can be written."""

    @property
    def name(self) -> str:
        """The name for `--shape`."""

    @property
    def layers(self) -> int:
        """The number of decoder layers."""

    @property
    def disk_bytes(self) -> int:
        """The bytes that it needs on disk."""

    @property
    def dense_bytes(self) -> int:
        """The bytes of its weights after conversion to plain weights."""

    def with_layers(self, layers: int) -> Self:
        """Return this shape with another number of layers."""

    def write(self, directory: Path) -> int:
        """Write the checkpoint into `directory`, which must exist; return the number of tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """A checkpoint with the tensors of a Llama model; the sizes are those of its config.json."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    scheme: str = "int4"
    shard_bytes: int = _SHARD_BYTES
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        scheme = SCHEMES[self.scheme]
        group = {"targets": ["Linear"], "weights": dict(scheme.weights)}
        if scheme.inputs is not None:
            group["input_activations"] = dict(scheme.inputs)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "version": "0.20.0",
                "format": scheme.format,
                "quantization_status": "compressed",
                "ignore": ["lm_head"],
                "config_groups": {"group_0": group},
            },
        }

    @property
    def disk_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs().values())

    @property
    def dense_bytes(self) -> int:
        """Bytes of all tensors after dequantizing to bfloat16."""
        elements = sum(rows * columns for _, rows, columns in self._linears())
        return 2 * elements + sum(spec.nbytes for spec in self._plain().values())

    def with_layers(self, layers: int) -> Self:
        """Return this shape with another number of layers."""
        return replace(self, layers=layers)

    def specs(self) -> dict[str, TensorSpec]:
        """Return the specs of all tensors by name, in the order in which they are written."""
        specs = self._plain()
        for module, rows, columns in self._linears():
            tensors = SCHEMES[self.scheme].specs(rows, columns)
            specs |= {f"{module}.{local}": spec for local, spec in tensors.items()}
        return specs

    def write(self, directory: Path) -> int:
        """Write the checkpoint in shards of `shard_bytes` into `directory`; return the number of tensors.

        Memory: one tensor.
        """
        import numpy as np

        from trtllm_ct.checkpoint.writer import ShardedWriter
        from trtllm_ct.layouts.stored_array import StoredArray

        specs = self.specs()
        shapes = {f"{module}.weight_shape": (rows, columns) for module, rows, columns in self._linears()}
        with ShardedWriter(directory, specs, max_shard_bytes=self.shard_bytes) as writer:
            for name, spec in specs.items():
                shape = shapes.get(name)
                stored = StoredArray(np.array(shape, np.int64), DType.I64) if shape else None
                writer.write(name, stored or random_tensor(name, spec, self.seed))
            writer.finish()
        (directory / "config.json").write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        return len(specs)

    def _linears(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, rows and columns of each quantized Linear."""
        kv_rows = self.hidden // self.heads * self.kv_heads
        for layer in range(self.layers):
            attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
            yield f"{attention}.q_proj", self.hidden, self.hidden
            yield f"{attention}.k_proj", kv_rows, self.hidden
            yield f"{attention}.v_proj", kv_rows, self.hidden
            yield f"{attention}.o_proj", self.hidden, self.hidden
            yield f"{mlp}.gate_proj", self.intermediate, self.hidden
            yield f"{mlp}.up_proj", self.intermediate, self.hidden
            yield f"{mlp}.down_proj", self.hidden, self.intermediate

    def _plain(self) -> dict[str, TensorSpec]:
        """Return the specs of the tensors that are not quantized: embedding, head and norms."""
        table, norm = (TensorSpec(DType.BF16, shape) for shape in ((self.vocabulary, self.hidden), (self.hidden,)))
        norms = [
            f"model.layers.{layer}.{local}.weight"
            for layer in range(self.layers)
            for local in ("input_layernorm", "post_attention_layernorm")
        ]
        tables = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), table)
        return {**tables, **dict.fromkeys([*norms, "model.norm.weight"], norm)}


def random_tensor(name: str, spec: TensorSpec, seed: int) -> StoredArray:
    """Return a tensor that depends only on its name and the seed: random bits as codes, finite numbers otherwise."""
    import numpy as np

    from trtllm_ct.layouts.stored_array import StoredArray

    if name.endswith("global_scale"):
        return StoredArray(np.full(spec.shape, _GLOBAL_SCALE, np.float32), DType.F32)
    random = np.random.Generator(np.random.SFC64([seed, crc32(name.encode())]))
    words = random.integers(0, 2**64 - 1, size=-(-spec.nbytes // 8), dtype=np.uint64, endpoint=True)
    is_scale = name.endswith("weight_scale")
    if spec.dtype is DType.BF16:
        random_bits, fixed_bits = _SMALL_POSITIVE if is_scale else _SMALL
        words &= np.uint64(random_bits * 0x0001_0001_0001_0001)
        words |= np.uint64(fixed_bits * 0x0001_0001_0001_0001)
    elif spec.dtype is DType.F8_E4M3:
        random_bits, fixed_bits = _E4M3_POSITIVE if is_scale else _E4M3
        words &= np.uint64(random_bits * 0x0101_0101_0101_0101)
        words |= np.uint64(fixed_bits * 0x0101_0101_0101_0101)
    return StoredArray.of_bytes(words.view(np.uint8)[: spec.nbytes].data, spec)


_1B = LlamaShape(name="1b", hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, vocabulary=32000)
_8B = LlamaShape(name="8b", hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocabulary=128256)
_LLAMA: tuple[LlamaShape, ...] = (
    # The target figures are for 1b and 8b. With tiny, the benchmark runs in seconds; its times are not meaningful.
    _1B,
    _8B,
    *(
        replace(shape, name=f"{shape.name}-{scheme}", scheme=scheme)
        for shape in (_1B, _8B)
        for scheme in ("fp8", "nvfp4")
    ),
    LlamaShape(
        name="tiny", hidden=512, intermediate=1024, layers=2, heads=8, kv_heads=4, vocabulary=512, shard_bytes=10**6
    ),
)

_ALL: tuple[Shape, ...] = (*_LLAMA, KimiShape())
SHAPES: Mapping[str, Shape] = MappingProxyType({shape.name: shape for shape in _ALL})
"""The checkpoints that `--shape` accepts."""

DEFAULT_SHAPES = ("1b",)
"""The shapes that are used without `--shape` and without a directory; they take some minutes and 3 GB of disk."""
