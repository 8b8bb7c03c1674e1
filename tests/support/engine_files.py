"""What the TensorRT backend makes of an engine-build checkpoint: a double of its loader, written from the format.

It knows the directory alone: which tensors each rank must have, what the load hook does to them, what its layers
compute with, and how the ranks' parts add up to the weights of the model. Nothing of the package under test is used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from engine_builder import joined_fp8
from engine_codes import KERNEL_BITS, codes_in_stream, e2m1_values
from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

__all__ = ["EngineFiles"]

Wanted = tuple[str, tuple[int, ...]]
LINEARS = {"attention.qkv": False, "attention.dense": True, "mlp.fc": False, "mlp.gate": False, "mlp.proj": True}
"""The Linears of a dense layer, and whether ranks divide their columns."""
QUANTIZATION_KEYS = {
    "quant_algo",
    "kv_cache_quant_algo",
    "group_size",
    "has_zero_point",
    "pre_quant_scale",
    "exclude_modules",
}
LAYER_KEYS = QUANTIZATION_KEYS - {"kv_cache_quant_algo", "exclude_modules"}
MAPPING_KEYS = {"world_size", "tp_size", "pp_size", "moe_tp_size", "moe_ep_size"}
ADDS_BIAS_IN_KERNEL = {"W4A16_AWQ", *KERNEL_BITS}
SWAPPING = {"FP8_PER_CHANNEL_PER_TOKEN", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"}
STATIC_INPUTS = {"FP8", "W8A8_SQ_PER_CHANNEL", "NVFP4"}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
HUGGING_FACE = {
    "attention.dense": "self_attn.o_proj",
    "mlp.fc": "mlp.gate_proj",
    "mlp.gate": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
    "input_layernorm": "input_layernorm",
    "post_layernorm": "post_attention_layernorm",
    "attention.q_layernorm": "self_attn.q_norm",
    "attention.k_layernorm": "self_attn.k_norm",
}


@dataclass(slots=True)
class Loaded:
    """One Linear as the model holds it on one rank: the weight [out, in] in float64, and its bias.

    `input_scale` is the static scale of its input as a multiplier, and `algo` what it computes with.
    """

    weight: Tensor
    bias: Tensor | None
    zero: Tensor | None = None
    input_scale: Tensor | None = None
    algo: str | None = None


class EngineFiles:
    """An engine-build checkpoint, as `PretrainedModel.from_checkpoint` reads it on a GPU of some SM.

    With `fused_mlp` the builder's pass has run that joins fc and gate, as it does unless `use_fused_mlp` is off.
    With `exact_inputs` the scales of inputs are read and left out: Linears compute what their weights alone give.
    """

    def __init__(self, directory: Path, *, sm: int = 80, fused_mlp: bool = False, exact_inputs: bool = False) -> None:
        self.directory = directory
        self.exact_inputs = exact_inputs
        self.sm = sm
        self.fused_mlp = fused_mlp
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self.quantization = self.config["quantization"]
        mapping = self.config["mapping"]
        unknown = (self.quantization.keys() - QUANTIZATION_KEYS) | (mapping.keys() - MAPPING_KEYS)
        assert not unknown, "unexpected keyword arguments raise TypeError"
        self.tp, self.pp = mapping["tp_size"], mapping["pp_size"]
        assert mapping["world_size"] == self.tp * self.pp
        self.algo: str | None = self.quantization["quant_algo"]
        self.layers: dict[str, Any] | None = None
        self.cache: str | None = self.quantization["kv_cache_quant_algo"]
        if self.algo == "MIXED_PRECISION":  # `to_layer_quant_config` replaces the whole block of config.json
            document = json.loads((directory / "quant_cfg.json").read_text(encoding="utf-8"))
            assert document.keys() == {"quant_algo", "kv_cache_quant_algo", "quantized_layers"}
            assert document["quant_algo"] == "MIXED_PRECISION", "the builder asks this block"
            self.layers, self.cache = document["quantized_layers"], document["kv_cache_quant_algo"]
            for block in document["quantized_layers"].values():
                assert block.keys() <= LAYER_KEYS, "QuantConfig(**block) raises TypeError"
        self.dtype: torch.dtype = getattr(torch, self.config["dtype"])
        self.head = self.config["head_size"]
        self.heads = self.config["num_attention_heads"] // self.tp
        kv_heads = self.config["num_key_value_heads"]
        assert kv_heads % self.tp == 0 or self.tp % kv_heads == 0
        self.kv_heads = max(kv_heads, self.tp) // self.tp
        self.repeats = max(1, self.tp // kv_heads)

    @cached_property
    def files(self) -> list[dict[str, Tensor]]:
        """The tensors of every rank's file."""
        return [load_file(self.directory / f"rank{rank}.safetensors") for rank in range(self.tp * self.pp)]

    @property
    def stages(self) -> list[range]:
        """The layers of each pipeline stage: the first ones have one more where they don't divide."""
        layers, first, stages = self.config["num_hidden_layers"], 0, []
        for stage in range(self.pp):
            count = layers // self.pp + (stage < layers % self.pp)
            stages.append(range(first, first + count))
            first += count
        return stages

    def excluded(self, name: str) -> bool:
        """Whether a Linear stays plain: patterns are compared by `fnmatchcase`, and an empty list is none."""
        if self.layers is not None:
            return not self._layer_block(name)
        patterns = self.quantization["exclude_modules"] or ["*lm_head", "*router", "*vocab_embedding"]
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    def block(self, name: str) -> dict[str, Any]:
        """How a Linear is quantized, {} for a plain one."""
        block = self.quantization if self.layers is None else self._layer_block(name)
        return {} if self.excluded(name) else block

    def _layer_block(self, name: str) -> dict[str, Any]:
        """The first entry of quant_cfg.json whose name, read as a pattern, is that of a Linear."""
        return next((block for pattern, block in (self.layers or {}).items() if fnmatchcase(name, pattern)), {})

    def wanted(self, rank: int) -> dict[str, Wanted]:
        """Dtype and shape of every tensor that the file of a rank must have."""
        stage, config = rank // self.tp, self.config
        hidden, vocabulary, dtype = config["hidden_size"], config["vocab_size"], config["dtype"]
        tensors: dict[str, Wanted] = {}
        if stage == 0:
            tensors["transformer.vocab_embedding.weight"] = (dtype, (vocabulary, hidden))
        for layer in range(len(self.stages[stage])):
            tensors |= self._layer_tensors(f"transformer.layers.{layer}.")
        if stage == self.pp - 1:
            tensors["transformer.ln_f.weight"] = (dtype, (hidden,))
            tensors["lm_head.weight"] = (dtype, (-(-vocabulary // self.tp), hidden))
        return tensors

    def _layer_tensors(self, prefix: str) -> dict[str, Wanted]:
        """The tensors of one layer."""
        config, dtype, moe = self.config, self.config["dtype"], "moe" in self.config
        tensors: dict[str, Wanted] = {}
        for norm in ("input_layernorm", "post_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = (dtype, (config["hidden_size"],))
            if self.algo == "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN":
                tensors[f"{prefix}{norm}.scale_to_int"] = (dtype, (1,))
        if config.get("qwen_type") == "qwen3":
            assert self.algo not in SWAPPING, "its attention has no norms"
            for norm in ("q_layernorm", "k_layernorm"):
                tensors[f"{prefix}attention.{norm}.weight"] = (dtype, (self.head,))
        if self.cache:
            tensors[f"{prefix}attention.kv_cache_scaling_factor"] = ("float32", (1,))
        tensors |= self._moe(prefix) if moe else {}
        for name, row_parallel in LINEARS.items():
            if not moe or not name.startswith("mlp"):
                tensors |= self._linear(prefix + name, *self.shape(name), row_parallel=row_parallel)
        return tensors

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a Linear on one rank."""
        hidden, inner = self.config["hidden_size"], self.config["intermediate_size"] // self.tp
        queries = self.heads * self.head
        return {
            "attention.qkv": (queries + 2 * self.kv_heads * self.head, hidden),
            "attention.dense": (hidden, queries),
            "mlp.fc": (inner, hidden),
            "mlp.gate": (inner, hidden),
            "mlp.proj": (hidden, inner),
        }[name]

    def _moe(self, prefix: str) -> dict[str, Wanted]:
        """The tensors of a layer's experts: router float32; up before gate."""
        hidden, inner = self.config["hidden_size"], self.config["intermediate_size"] // self.tp
        experts, dtype = self.config["moe"]["num_experts"], self.config["dtype"]
        assert self.algo is None, "experts of this directory are plain"
        return {
            f"{prefix}mlp.router.weight": ("float32", (experts, hidden)),
            f"{prefix}mlp.fc.weight": (dtype, (experts, 2 * inner, hidden)),
            f"{prefix}mlp.proj.weight": (dtype, (experts, hidden, inner)),
        }

    def _linear(self, name: str, out: int, in_: int, *, row_parallel: bool) -> dict[str, Wanted]:
        """The tensors of one Linear in the file."""
        dtype, block = self.config["dtype"], self.block(name)
        group, algo = block.get("group_size", 128), block.get("quant_algo")
        bias = "attn_bias" if "attention" in name else "mlp_bias"
        has_bias = self.config[bias] and not (row_parallel and "qwen_type" in self.config)
        tensors: dict[str, Wanted] = {"bias": (dtype, (out,))} if has_bias else {}
        if algo in ADDS_BIAS_IN_KERNEL:
            whole = (out * (1 if row_parallel else self.tp), in_ * (self.tp if row_parallel else 1))
            assert group in {64, 128}
            assert not any(size % (max(64, group) * self.tp) for size in whole), f"{name} {whole} would be padded"
        vector, scalar = ("float32", (out,)), ("float32", (1,))
        zeros = {"zero": (dtype, (in_ // group, out))} if block.get("has_zero_point") else {}
        prequant = {"prequant_scaling_factor": (dtype, (in_,))}
        smoother = {"smoother": ("float32", (1, in_))} if row_parallel else {}
        forms: dict[str | None, dict[str, Wanted]] = {
            None: {"weight": (dtype, (out, in_))},
            "W4A16_AWQ": {
                "weight": ("int8", (out // 2, in_)),
                "weights_scaling_factor": ("float32", (out, in_ // group)),
                **(prequant if block.get("pre_quant_scale") else {}),
                **zeros,
            },
            **{
                gptq: {
                    "weight": (dtype, (in_, out * bits // 16)),
                    "weights_scaling_factor": (dtype, (in_ // group, out)),
                    **zeros,
                }
                for gptq, bits in KERNEL_BITS.items()
            },
            "W8A16": {"weight": ("int8", (in_, out)), "per_channel_scale": (dtype, (out,))},
            "FP8": {
                "weight": ("float8_e4m3fn", (out, in_)),
                "weights_scaling_factor": scalar,
                "activation_scaling_factor": scalar,
            },
            "FP8_PER_CHANNEL_PER_TOKEN": {"weight": ("float8_e4m3fn", (out, in_)), "per_channel_scale": vector},
            "W8A8_SQ_PER_CHANNEL": {
                "weight": ("int8", (out, in_)),
                "weights_scaling_factor": vector,
                "activation_scaling_factor": scalar,
                **prequant,
            },
            "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": {
                "weight": ("int8", (out, in_)),
                "per_channel_scale": ("float32", (1, out)),
                **smoother,
            },
            "NVFP4": {
                "weight": ("uint8", (out, in_ // 2)),
                "weights_scaling_factor": ("float8_e4m3fn", (out, in_ // 16)),
                "weights_scaling_factor_2": scalar,
                "activation_scaling_factor": scalar,
            },
        }
        if self.algo == "W8A16" and algo is None:
            # The load hook quantizes what its list excludes by the name of the Linear, unless the tensor matches too.
            assert self.excluded(f"{name}.weight"), f"{name} would be quantized"
        if algo == "W8A16":
            assert self.config["disable_weight_only_quant_plugin"], "or the file depends on the GPU"
        tensors |= forms[algo]
        return {f"{name}.{local}": spec for local, spec in tensors.items()}

    def check_tensors(self) -> None:
        """Assert that each file has exactly the tensors that its rank must have."""
        for rank, tensors in enumerate(self.files):
            held = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}
            assert held == self.wanted(rank)

    def linear(self, rank: int, name: str) -> Loaded:
        """One Linear of a rank after the load hook, dequantized as its layer does."""
        held = {
            key.removeprefix(f"{name}."): value for key, value in self.files[rank].items() if key.startswith(f"{name}.")
        }
        block, zero = self.block(name), None
        algo, weight = block.get("quant_algo"), held["weight"]
        match algo:
            case None:
                weight = weight.double()
            case "W4A16_AWQ":
                weight, zero = self._groupwise(held, block["group_size"])
            case "W4A16_GPTQ" | "W8A16_GPTQ":
                weight, zero = self._permuted(held, KERNEL_BITS[algo], block["group_size"])
            case "W8A16":
                weight = weight.T.double() * held["per_channel_scale"].double()[:, None]
            case "FP8":
                weight = weight.double() * held["weights_scaling_factor"].double()
            case "FP8_PER_CHANNEL_PER_TOKEN":
                weight = weight.double() * held["per_channel_scale"].double()[:, None]
            case "W8A8_SQ_PER_CHANNEL":
                weight = weight.double() * held["weights_scaling_factor"].double()[:, None]
                weight = weight * held["prequant_scaling_factor"].double()
            case "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN":
                weight = weight.double() * held["per_channel_scale"].double().T
                weight = weight / held["smoother"].double() if "smoother" in held else weight
            case "NVFP4":
                codes = e2m1_values(weight)
                scale = held["weights_scaling_factor"].double().repeat_interleave(16, dim=1)
                weight = codes * scale * held["weights_scaling_factor_2"].double()
        bias = self._loaded_bias(held.get("bias"), rank, name)
        scale = held.get("activation_scaling_factor")
        assert (scale is not None) == (algo in STATIC_INPUTS)
        return Loaded(weight=weight, bias=bias, zero=zero, input_scale=None if self.exact_inputs else scale, algo=algo)

    def mlp(self, rank: int, prefix: str) -> tuple[Loaded, Loaded]:
        """Fc and gate of a rank as the engine has them; both are read by the mode of fc."""
        names = (f"{prefix}mlp.fc", f"{prefix}mlp.gate")
        fc, gate = (self.linear(rank, name) for name in names)
        assert self.block(names[0]) == self.block(names[1])
        if not self.fused_mlp or self.block(names[0]).get("quant_algo") != "FP8":
            return fc, gate  # plain and row-wise ones are joined as they are, others are not
        held = self.files[rank]
        codes, scale = joined_fp8(
            held[f"{names[1]}.weight"],
            held[f"{names[0]}.weight"],
            held[f"{names[1]}.weights_scaling_factor"],
            held[f"{names[0]}.weights_scaling_factor"],
            self.dtype,
        )
        above, below = (codes.double() * scale.double()).chunk(2)
        scales = [linear.input_scale for linear in (fc, gate) if linear.input_scale is not None]
        scale = torch.maximum(*scales)
        return (
            Loaded(weight=below, bias=fc.bias, input_scale=scale, algo=fc.algo),
            Loaded(weight=above, bias=gate.bias, input_scale=scale, algo=gate.algo),
        )

    def _loaded_bias(self, bias: Tensor | None, rank: int, name: str) -> Tensor | None:
        """A bias after the load hook.

        Groupwise layers add it inside the plug-in, before ranks are added up. Under W4A16_AWQ the hook zeroes it, by
        its name alone: also that of a plain Linear, which adds it on every rank afterwards.
        """
        algo = (self.quantization if self.layers is None else self.block(name)).get("quant_algo")
        zeroed = algo == "W4A16_AWQ" and name.endswith(("dense", "proj")) and rank % self.tp
        return torch.zeros_like(bias) if bias is not None and zeroed else bias

    def _permuted(self, held: dict[str, Tensor], bits: int, group: int) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in] of codes in the order of the kernel, and its zeros in the same shape."""
        in_, out = held["weight"].shape[0], held["weight"].shape[1] * 16 // bits
        stream = held["weight"].view(torch.uint8).numpy().tobytes()
        codes = torch.from_numpy(codes_in_stream(stream, in_, out, bits=bits, inputs=16, sm=self.sm)).double()
        scale, zero = (
            held[local].double().repeat_interleave(group, dim=0) for local in ("weights_scaling_factor", "zero")
        )
        return (codes * scale + zero).T.contiguous(), zero.T.contiguous()

    def _groupwise(self, held: dict[str, Tensor], group: int) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in] of a groupwise int4 Linear, and its zeros in the same shape."""
        packed = held["weight"]
        assert packed.dtype == torch.int8, "the load hook permutes int8 tensors only"
        codes = torch.stack([(packed << 4) >> 4, packed >> 4], dim=1).reshape(-1, packed.shape[1]).double()
        scale = held["weights_scaling_factor"].to(self.dtype).double().repeat_interleave(group, dim=1)
        weight = codes * scale
        if "prequant_scaling_factor" in held:
            weight = weight * held["prequant_scaling_factor"].double()
        if "zero" not in held:
            return weight, None
        zero = held["zero"].double().T.repeat_interleave(group, dim=1)
        return weight + zero, zero

    def weights(self) -> dict[str, Tensor]:
        """Every weight and bias of the model in float64, under the names of Hugging Face.

        Parts of ranks are joined, and repeated K/V heads must be equal.
        """
        result = dict(self._outside())
        for stage, layers in enumerate(self.stages):
            for local, layer in enumerate(layers):
                ranks = range(stage * self.tp, (stage + 1) * self.tp)
                result |= {f"model.layers.{layer}.{name}": t for name, t in self._layer(ranks, local)}
        return result

    def input_scales(self) -> dict[str, float]:
        """The static scale of the input of each Linear that has one, under the names of Hugging Face.

        All ranks have the same, and so have queries, keys and values.
        """
        scales: dict[str, float] = {}
        for stage, layers in enumerate(self.stages):
            ranks = range(stage * self.tp, (stage + 1) * self.tp)
            for local, layer in enumerate(layers):
                for name in LINEARS:
                    parts = [self._linear_of_layer(rank, f"transformer.layers.{local}.", name) for rank in ranks]
                    values = {None if part.input_scale is None else float(part.input_scale) for part in parts}
                    assert len(values) == 1
                    value = values.pop()
                    paths = QKV if name == "attention.qkv" else (HUGGING_FACE[name],)
                    scales |= {} if value is None else {f"model.layers.{layer}.{path}": value for path in paths}
        return scales

    def zeros(self) -> dict[str, Tensor]:
        """The magnitudes of the zeros that are added to each weight, under the names of Hugging Face."""
        self._of_zeros = True
        try:
            return {name: tensor.abs() for name, tensor in self.weights().items() if name.endswith("proj.weight")}
        finally:
            self._of_zeros = False

    _of_zeros = False

    def _outside(self) -> Iterator[tuple[str, Tensor]]:
        first, last = self.files[: self.tp], self.files[-self.tp :]
        yield "model.embed_tokens.weight", _same(part["transformer.vocab_embedding.weight"] for part in first)
        yield "model.norm.weight", _same(part["transformer.ln_f.weight"] for part in last)
        head, vocabulary = torch.cat([part["lm_head.weight"] for part in last]).double(), self.config["vocab_size"]
        assert not head[vocabulary:].any(), "padding is zero"
        yield "lm_head.weight", head[:vocabulary]

    def _layer(self, ranks: range, local: int) -> Iterator[tuple[str, Tensor]]:
        prefix = f"transformer.layers.{local}."
        for name, hf in HUGGING_FACE.items():
            if f"{prefix}{name}.weight" in self.files[ranks[0]] and name.endswith("norm"):
                yield f"{hf}.weight", _same(self.files[rank][f"{prefix}{name}.weight"] for rank in ranks)
        if "moe" in self.config:
            yield from self._experts(ranks, prefix)
        for name, row_parallel in LINEARS.items():
            if "moe" in self.config and name.startswith("mlp"):
                continue
            parts = [self._linear_of_layer(rank, prefix, name) for rank in ranks]
            weights = [part.zero if self._of_zeros and part.zero is not None else part.weight for part in parts]
            biases = [part.bias for part in parts]
            if name == "attention.qkv":
                yield from self._qkv(weights, "weight")
                if biases[0] is not None:
                    yield from self._qkv([bias.double() for bias in biases if bias is not None], "bias")
                continue
            yield f"{HUGGING_FACE[name]}.weight", torch.cat(weights, dim=1 if row_parallel else 0)
            if biases[0] is not None:
                yield f"{HUGGING_FACE[name]}.bias", self._bias(biases, prefix + name, row_parallel=row_parallel)

    def _linear_of_layer(self, rank: int, prefix: str, name: str) -> Loaded:
        if name in {"mlp.fc", "mlp.gate"}:
            return self.mlp(rank, prefix)[name == "mlp.gate"]
        return self.linear(rank, prefix + name)

    def _bias(self, biases: list[Any], name: str, *, row_parallel: bool) -> Tensor:
        """What is added to the output: parts side by side, or once after the ranks are added up."""
        if not row_parallel:
            return torch.cat(biases).double()
        if self.block(name).get("quant_algo") in ADDS_BIAS_IN_KERNEL:
            return torch.stack(biases).double().sum(dim=0)
        return _same(iter(biases))

    def _qkv(self, parts: list[Tensor], local: str) -> Iterator[tuple[str, Tensor]]:
        """The three Linears of the ranks' fused rows: queries, then keys, then values."""
        queries, keys = self.heads * self.head, self.kv_heads * self.head
        split = [part.split([queries, keys, keys]) for part in parts]
        yield f"self_attn.q_proj.{local}", torch.cat([q for q, _, _ in split])
        for position, letter in ((1, "k"), (2, "v")):
            heads = [part[position] for part in split]
            for first in range(0, self.tp, self.repeats):
                assert all(torch.equal(heads[first], copy) for copy in heads[first : first + self.repeats])
            yield f"self_attn.{letter}_proj.{local}", torch.cat(heads[:: self.repeats])

    def _experts(self, ranks: range, prefix: str) -> Iterator[tuple[str, Tensor]]:
        yield (
            "block_sparse_moe.gate.weight",
            _same(self.files[rank][f"{prefix}mlp.router.weight"] for rank in ranks),
        )
        fused = [self.files[rank][f"{prefix}mlp.fc.weight"].double().chunk(2, dim=1) for rank in ranks]
        down = torch.cat([self.files[rank][f"{prefix}mlp.proj.weight"].double() for rank in ranks], dim=2)
        up, gate = (torch.cat([half[side] for half in fused], dim=1) for side in (0, 1))
        for expert in range(self.config["moe"]["num_experts"]):
            for projection, stack in (("w1", gate), ("w2", down), ("w3", up)):
                yield f"block_sparse_moe.experts.{expert}.{projection}.weight", stack[expert]


def _same(parts: Iterator[Any]) -> Tensor:
    """The tensor that all ranks have."""
    first, *others = parts
    assert all(torch.equal(first, other) for other in others)
    return first.double()
