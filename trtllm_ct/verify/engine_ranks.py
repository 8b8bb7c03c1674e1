"""The files of the ranks of an engine-build checkpoint: the weights of the model that their parts add up to.

It is written from the description of the format and shares no tables with `plan/`: names, cuts and layouts are here
again.
Source: TensorRT-LLM `models/modeling_utils.py` (`preprocess_weights`) and `models/llama/convert.py` (0afa06ab).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import CatalogError, Fault
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.checkpoint.header import read_header
from trtllm_ct.checkpoint.source import Folder
from trtllm_ct.config.json_file import read_json_object
from trtllm_ct.verify.engine_exclusions import is_excluded
from trtllm_ct.verify.engine_keys import checked_layers
from trtllm_ct.verify.kernel_order import rows_in_stream, tile_rows
from trtllm_ct.verify.source.files import FileTensor, TensorFiles, Transposed, tensors_of
from trtllm_ct.verify.source.numbers import E2M1, look_up, nibbles
from trtllm_ct.verify.source.rounding import rounded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from typing_extensions import Self

__all__ = ["EngineRanks", "Located", "is_engine_directory"]

_NIBBLE = 4
_NVFP4_GROUP = 16
_LINEARS = {
    "self_attn.q_proj": "attention.qkv",
    "self_attn.k_proj": "attention.qkv",
    "self_attn.v_proj": "attention.qkv",
    "self_attn.o_proj": "attention.dense",
    "mlp.gate_proj": "mlp.fc",
    "mlp.up_proj": "mlp.gate",
    "mlp.down_proj": "mlp.proj",
    "mlp.gate": "mlp.router",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_layernorm",
    "self_attn.q_norm": "attention.q_layernorm",
    "self_attn.k_norm": "attention.k_layernorm",
}
_OUTSIDE = {"embed_tokens": "transformer.vocab_embedding", "norm": "transformer.ln_f", "lm_head": "lm_head"}
_EXPERT_PARTS = {"gate": "mlp.fc", "up": "mlp.fc", "down": "mlp.proj"}
_QUANTIZED = frozenset({"attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"})
_KERNEL_BITS = {"W4A16_GPTQ": 4, "W8A16_GPTQ": 8}
"""The algorithms whose codes are in the order of a kernel, and the bits of a code."""
_ROW_PARALLEL = frozenset({"attention.dense", "mlp.proj"})


def is_engine_directory(directory: Path) -> bool:
    """Whether a directory is an engine-build checkpoint: config.json with a mapping, and the file of rank 0."""
    if not (directory / "rank0.safetensors").is_file() or not (directory / "config.json").is_file():
        return False
    config = read_json_object(directory / "config.json")
    return "architecture" in config and isinstance(config.get("mapping"), dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """The part of a module that one rank has.

    It is rows `first` to `first + rows` of the engine's module `name` in the file of `rank`, which are rows `begin` and
    the following ones of the module's weight. With `columns` the ranks' parts lie side by side instead. The engine's
    module has `total` rows on the rank.
    """

    rank: int
    name: str
    begin: int
    rows: int
    total: int
    first: int = 0
    columns: bool = False
    expert: int | None = None


@dataclass(slots=True)
class EngineRanks:
    """The tensors of all ranks, and where the parts of each module are; leaving the context closes the files.

    `layer_modes` is quant_cfg.json, None if config.json has one mode for all Linears.
    """

    directory: Path
    config: Mapping[str, Any] = field(init=False)
    files: list[dict[str, FileTensor]] = field(init=False, default_factory=list)
    seen: set[tuple[int, str]] = field(init=False, default_factory=set)
    layer_modes: Mapping[str, Any] | None = field(init=False, default=None)
    _stack: ExitStack = field(init=False, default_factory=ExitStack)

    def __enter__(self) -> Self:
        self.config = read_json_object(self.directory / "config.json")
        self.layer_modes = checked_layers(self.directory, self.config, _DEQUANTIZED)
        for rank in range(self.tensor * self.pipeline):
            file = f"rank{rank}.safetensors"
            if not (self.directory / file).is_file():
                raise CatalogError(
                    Fault(
                        where=str(self.directory),
                        expected=f"{file}: one file for each of {self.tensor * self.pipeline} ranks",
                        found="no such file",
                        remedy="Convert again; the directory is not complete.",
                    )
                )
            tensors = read_header(self.directory / file, file).tensors
            catalog = Catalog(source=Folder(self.directory), tensors=tensors, files=(file,))
            self.files.append(tensors_of(self._stack.enter_context(TensorFiles(catalog))))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def tensor(self) -> int:
        """The tensor-parallel size."""
        return int(self.config["mapping"]["tp_size"])

    @property
    def pipeline(self) -> int:
        """The number of pipeline stages."""
        return int(self.config["mapping"]["pp_size"])

    @property
    def quantization(self) -> dict[str, Any]:
        """The block `quantization` of config.json."""
        block: dict[str, Any] = self.config["quantization"]
        return block

    @property
    def sm(self) -> int:
        """The SM of the GPUs in whose order the codes are; `engine_keys.py` has checked it for files that need it."""
        sm: int = self.config["producer"]["sm"]
        return sm

    @property
    def cache(self) -> str | None:
        """The mode of the KV cache: quant_cfg.json replaces the whole block of config.json.

        Source: TensorRT-LLM `models/modeling_utils.py: PretrainedConfig.to_layer_quant_config`.
        """
        block = self.quantization if self.layer_modes is None else self.layer_modes
        cache: str | None = block["kv_cache_quant_algo"]
        return cache

    @property
    def layers_of_stage(self) -> int:
        """The number of layers in the first pipeline stage; no other has more."""
        return -(-int(self.config["num_hidden_layers"]) // self.pipeline)

    @property
    def linears(self) -> frozenset[str]:
        """The names of all Linears in layers that may be quantized; layers are counted in each stage from 0."""
        return frozenset(
            f"transformer.layers.{layer}.{local}" for layer in range(self.layers_of_stage) for local in _QUANTIZED
        )

    @property
    def dtype(self) -> DType:
        """The dtype of the model."""
        return DType.from_torch(self.config["dtype"])

    def algo(self, name: str) -> str | None:
        """Return the algorithm of an engine's module, None for a plain one."""
        local = name.split(".", 3)[-1]
        excluded = is_excluded(name, self.quantization.get("exclude_modules"))
        quantized = name.startswith("transformer.layers.") and local in _QUANTIZED
        algo: str | None = self.block(name).get("quant_algo")
        return algo if quantized and not excluded else None

    def block(self, name: str) -> Mapping[str, Any]:
        """Return how an engine's module is quantized: the block of all, or its own in quant_cfg.json."""
        if self.layer_modes is None:
            return self.quantization
        block: Mapping[str, Any] = self.layer_modes["quantized_layers"].get(name, {})
        return block

    def stage(self, layer: int) -> tuple[int, int]:
        """Return the pipeline stage of a layer and its number there."""
        size, more = divmod(int(self.config["num_hidden_layers"]), self.pipeline)
        first = 0
        for stage in range(self.pipeline):
            count = size + (stage < more)
            if layer < first + count:
                return stage, layer - first
            first += count
        raise ValueError(f"no layer {layer}")

    def parts(self, key: str, rows: int) -> list[Located] | None:
        """Return where the `rows` rows of a module are, one part for each rank; None if the engine has no such module.

        Ranks with equal parts are all listed. `key` is that of `verify/source/names.py`.
        """
        if key in _OUTSIDE:
            return self._outside(key, rows)
        section, _, inner = key.partition(".")
        number, _, path = inner.partition(".")
        if section != "layers" or not number.isdigit() or int(number) >= int(self.config["num_hidden_layers"]):
            return None
        stage, local = self.stage(int(number))
        prefix, ranks = f"transformer.layers.{local}.", [stage * self.tensor + rank for rank in range(self.tensor)]
        if path.startswith("mlp.experts."):
            _, _, expert, projection = path.split(".")
            if "moe" in self.config and int(expert) >= self.config["moe"]["num_experts"]:
                return None
            return self._expert_parts(ranks, prefix, int(expert), projection, rows)
        name = _LINEARS.get(path)
        if name is None:
            return None
        cut = [self._cut(path, rank, rows) for rank in range(self.tensor)]
        return [
            Located(
                rank=rank,
                name=prefix + name,
                begin=begin,
                rows=count,
                total=self._fused_rows() if name == "attention.qkv" else count,
                first=first,
                columns=name in _ROW_PARALLEL,
            )
            for rank, (begin, count, first) in zip(ranks, cut, strict=True)
        ]

    def _outside(self, key: str, rows: int) -> list[Located]:
        """Return the parts of a module outside of layers; rows of the head are divided with ceiling division."""
        first = 0 if key == "embed_tokens" else (self.pipeline - 1) * self.tensor
        size = -(-rows // self.tensor) if key == "lm_head" else rows
        return [
            Located(
                rank=first + rank,
                name=_OUTSIDE[key],
                begin=min(rank * size, rows) if key == "lm_head" else 0,
                rows=max(0, min(size, rows - rank * size)) if key == "lm_head" else rows,
                total=size,
            )
            for rank in range(self.tensor)
        ]

    def _fused_rows(self) -> int:
        """Return the rows of queries, keys and values on each rank."""
        heads, kv_heads = int(self.config["num_attention_heads"]), int(self.config["num_key_value_heads"])
        return (heads // self.tensor + 2 * max(kv_heads // self.tensor, 1)) * int(self.config["head_size"])

    def _cut(self, path: str, rank: int, rows: int) -> tuple[int, int, int]:
        """Return the first row of a rank's part, the number of its rows, and its first row in the engine's module."""
        leaf = path.rpartition(".")[2]
        if leaf in {"q_proj", "k_proj", "v_proj"}:
            head, heads = int(self.config["head_size"]), int(self.config["num_attention_heads"])
            kv_heads = int(self.config["num_key_value_heads"])
            queries, keys = heads // self.tensor * head, max(kv_heads // self.tensor, 1) * head
            if leaf == "q_proj":
                return rank * queries, queries, 0
            repeats = max(1, self.tensor // kv_heads)
            return rank // repeats * keys, keys, queries + (keys if leaf == "v_proj" else 0)
        if leaf in {"gate_proj", "up_proj"}:
            return rank * (rows // self.tensor), rows // self.tensor, 0
        return 0, rows, 0

    def _expert_parts(self, ranks: Sequence[int], prefix: str, expert: int, leaf: str, rows: int) -> list[Located]:
        """Return the parts of one projection of an expert: rows of up come before those of gate."""
        size = rows if leaf == "down" else rows // self.tensor
        return [
            Located(
                rank=rank,
                name=prefix + _EXPERT_PARTS[leaf],
                begin=0 if leaf == "down" else index * size,
                rows=size,
                total=size if leaf == "down" else 2 * size,
                first=size if leaf == "gate" else 0,
                columns=leaf == "down",
                expert=expert,
            )
            for index, rank in enumerate(ranks)
        ]

    def whole(self, part: Located, local: str) -> FileTensor | None:
        """Return a tensor of the engine's module with all experts, None if there is none; it counts as explained."""
        name = f"{part.name}.{local}"
        self.seen.add((part.rank, name))
        return self.files[part.rank].get(name)

    def find(self, part: Located, local: str) -> FileTensor | None:
        """Return the part of a tensor of the engine's module that belongs to an expert, or all of it if none does."""
        tensor = self.whole(part, local)
        return tensor if tensor is None or part.expert is None else tensor.entry(part.expert)

    def get(self, part: Located, local: str) -> FileTensor:
        """Return a tensor of the engine's module that `part` is in; raises `KeyError` if there is none."""
        tensor = self.find(part, local)
        if tensor is None:
            raise KeyError(f"rank{part.rank}.safetensors: {part.name}.{local}")
        return tensor

    def has_bias(self, name: str) -> bool:
        """Whether the modules of this name in the layers have a bias."""
        return any(tensor.endswith(f".{name}.bias") for tensor in self.files[0])

    def unseen(self) -> Iterator[tuple[int, str]]:
        """Yield the tensors that no module of the source explains, as (rank, name)."""
        for rank, tensors in enumerate(self.files):
            yield from ((rank, name) for name in tensors if (rank, name) not in self.seen)

    def weight_rows(self, part: Located, begin: int, end: int) -> NDArray[np.float64]:
        """Return rows `begin` to `end` of a part, dequantized as the engine does; counted from the part's first row."""
        begin, end = part.first + begin, part.first + end
        algo = self.algo(part.name)
        weight = self.get(part, "weight")
        if algo is None:
            return weight.numbers(begin, end)
        return _DEQUANTIZED[algo](self, part, begin, end)

    def _vector(self, part: Located, local: str, begin: int, end: int) -> NDArray[np.float64]:
        """Return a scale for each row, [n, 1]."""
        return self.get(part, local).all_numbers().reshape(-1, 1)[begin:end]

    def groupwise(self, part: Located, begin: int, end: int) -> NDArray[np.float64]:
        """Return rows of W4A16_AWQ: two rows in a byte, scales cast to the model's dtype, zeros added."""
        packed = self.get(part, "weight").rows(begin // 2, -(-end // 2))
        low, high = np.left_shift(packed, _NIBBLE) >> _NIBBLE, packed >> _NIBBLE
        codes = np.stack((low, high), axis=1).reshape(-1, packed.shape[1])[begin % 2 :][: end - begin]
        scale = rounded(self.get(part, "weights_scaling_factor").numbers(begin, end), self.dtype)
        return self._scaled_groups(part, codes, scale, begin, end)

    def in_kernel_order(self, part: Located, begin: int, end: int) -> NDArray[np.float64]:
        """Return rows of W4A16_GPTQ or W8A16_GPTQ: one stream of bytes, seen as [in, out / codes in an element]."""
        weight, bits = self.get(part, "weight"), _KERNEL_BITS[self.block(part.name)["quant_algo"]]
        columns, together = weight.shape[0], tile_rows(bits, self.sm)
        first, last = begin // together * together, -(-end // together) * together
        row_bytes = columns * bits // 8
        stream = weight.bytes_at(first * row_bytes, (last - first) * row_bytes)
        codes = rows_in_stream(stream, columns, bits=bits, sm=self.sm)[begin - first : end - first]
        scale = Transposed(matrix=self.get(part, "weights_scaling_factor")).numbers(begin, end)
        return self._scaled_groups(part, codes, scale, begin, end)

    def _scaled_groups(
        self, part: Located, codes: NDArray[Any], scale: NDArray[np.float64], begin: int, end: int
    ) -> NDArray[np.float64]:
        """Return code * scale, with zeros added if the mode has them."""
        block = self.block(part.name)
        group = int(block["group_size"])
        values = codes * np.repeat(scale, group, axis=1)
        if block["has_zero_point"]:
            zero = Transposed(matrix=self.get(part, "zero")).numbers(begin, end)
            values = values + np.repeat(zero, group, axis=1)
        return values

    def plain_int8(self, part: Located, begin: int, end: int) -> NDArray[np.float64]:
        """Return rows of W8A16 without the plug-in: int8 [in, out]."""
        codes = Transposed(matrix=self.get(part, "weight")).numbers(begin, end)
        return codes * self._vector(part, "per_channel_scale", begin, end)

    def scalar_scale(self, part: Located, begin: int, end: int) -> NDArray[np.float64]:
        """Return rows of FP8."""
        scale = float(self.get(part, "weights_scaling_factor").all_numbers().item())
        return self.get(part, "weight").numbers(begin, end) * scale

    def row_scale(self, part: Located, begin: int, end: int) -> NDArray[np.float64]:
        """Return rows of modes with one scale for each row."""
        local = "per_channel_scale" if self.find(part, "per_channel_scale") else "weights_scaling_factor"
        return self.get(part, "weight").numbers(begin, end) * self._vector(part, local, begin, end)

    def two_level(self, part: Located, begin: int, end: int) -> NDArray[np.float64]:
        """Return rows of NVFP4."""
        codes = look_up(nibbles(self.get(part, "weight").rows(begin, end)), E2M1)
        scale = self.get(part, "weights_scaling_factor").numbers(begin, end)
        factor = float(self.get(part, "weights_scaling_factor_2").all_numbers().item())
        return codes * np.repeat(scale, _NVFP4_GROUP, axis=1) * factor


_DEQUANTIZED = {
    "W4A16_AWQ": EngineRanks.groupwise,
    "W4A16_GPTQ": EngineRanks.in_kernel_order,
    "W8A16_GPTQ": EngineRanks.in_kernel_order,
    "W8A16": EngineRanks.plain_int8,
    "FP8": EngineRanks.scalar_scale,
    "FP8_PER_CHANNEL_PER_TOKEN": EngineRanks.row_scale,
    "W8A8_SQ_PER_CHANNEL": EngineRanks.row_scale,
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": EngineRanks.row_scale,
    "NVFP4": EngineRanks.two_level,
}
