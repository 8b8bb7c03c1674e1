"""A directory with the tensors of Kimi K2: 62 shards, 208 215 tensors, 600 GB of sparse files with real headers.

The payload is never written. Commands that read only headers treat it like the real checkpoint.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.plan.models.places import PLACES
from trtllm_ct.plan.models.sites import Model

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from typing_extensions import Self

__all__ = ["KimiShape", "write_sparse_file"]

_CONFIG: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 163840,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "version": "0.12.0",
        "format": "pack-quantized",
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
        ],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
            }
        },
    },
}

_HEADER_BYTES = 200
"""The most bytes on disk for one tensor, in a header and in the index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KimiShape:
    """Kimi K2 with `layers` of its 61 layers; one shard per layer, and one for the embedding and the head."""

    name: str = "kimi-k2"
    layers: int = 61

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return {**_CONFIG, "num_hidden_layers": self.layers}

    @property
    def disk_bytes(self) -> int:
        """The most bytes that the directory needs on disk; the payload is sparse and needs none."""
        return _HEADER_BYTES * sum(1 for _ in self.tensors())

    @property
    def dense_bytes(self) -> int:
        """Zero, since this checkpoint is never converted: its payload is missing."""
        return 0

    def with_layers(self, layers: int) -> Self:
        """Return this shape with another number of layers."""
        return replace(self, layers=layers)

    def tensors(self) -> Iterator[tuple[int, str, TensorSpec]]:
        """Yield the shard, name and spec of each tensor.

        Routed experts are int4 in groups of 32; other weights are bfloat16.
        """
        for module, stated in Model.from_config(self.config).stated_modules(PLACES[0]):
            parts = module.split(".")
            shard = int(parts[2]) + 1 if parts[1:2] == ["layers"] else 0
            if "experts" not in parts:
                yield shard, f"{module}.weight", TensorSpec(DType.BF16, stated.shape)
                for local in stated.locals:
                    yield shard, f"{module}.{local}", TensorSpec(DType.F32, stated.shape[:1])
                continue
            rows, columns = stated.shape
            yield shard, f"{module}.weight_packed", TensorSpec(DType.I32, (rows, columns // 8))
            yield shard, f"{module}.weight_scale", TensorSpec(DType.BF16, (rows, columns // 32))
            yield shard, f"{module}.weight_shape", TensorSpec(DType.I64, (2,))

    def write(self, directory: Path) -> int:
        """Write the files into `directory`, which must exist; return the number of tensors. Takes seconds."""
        shards: dict[int, dict[str, TensorSpec]] = defaultdict(dict)
        for shard, name, spec in self.tensors():
            shards[shard][name] = spec
        weight_map: dict[str, str] = {}
        for shard, specs in shards.items():
            file = f"model-{shard + 1:05d}-of-{len(shards):05d}.safetensors"
            write_sparse_file(directory / file, specs)
            weight_map |= dict.fromkeys(specs, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        (directory / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
        return len(weight_map)


def write_sparse_file(path: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Write a safetensors file with a real header and the right size, whose payload is a hole."""
    header, end = {}, 0
    for name, spec in specs.items():
        begin, end = end, end + spec.nbytes
        header[name] = {"dtype": spec.dtype.header_name, "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
