"""Model families as tables: which modules a model has, of which sizes, and which of them an engine fuses.

The planner takes nothing about a model from its weights alone: a checkpoint that lacks a module, or whose weights
don't have the sizes of its config.json, is refused before a byte of it is read. Sources: transformers 5.23
`models/{llama,mistral,qwen2,qwen3}/modeling_*.py`; TensorRT-LLM `_torch/models/checkpoints/hf/weight_mapper.py` for
the fused groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct.dtypes import DType
from trtllm_ct.errors import ConfigError, Fault, FaultCollector

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["ARCHITECTURES", "Architecture", "LinearSite", "Model", "Site"]

_LAYERS = "model.layers"
EMBEDDING = "model.embed_tokens"
LM_HEAD = "lm_head"
ALWAYS = "always"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSite:
    """One Linear of every layer: its path in the layer, its sizes by name, the fused group that it joins.

    `bias` is the key of config.json that gives it a bias, or `always`.
    """

    path: str
    outputs: str
    inputs: str
    fused: str | None = None
    bias: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One module that a model must have: full name, class, weight shape, full name of its fused group, bias or not."""

    module: str
    class_name: str
    shape: tuple[int, ...]
    fused: str | None = None
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A family of decoder-only models by its layer: Linears, and norms with the size of each."""

    linears: tuple[LinearSite, ...]
    norms: tuple[tuple[str, str], ...]
    norm_class: str


def _attention_and_mlp(
    *, qkv: str | None = None, output: str | None = None, mlp: str | None = None
) -> tuple[LinearSite, ...]:
    """The seven Linears of a Llama-like layer; the arguments say where their biases come from."""
    fused_qkv, fused_mlp = "self_attn.qkv_proj", "mlp.gate_up_proj"
    return (
        LinearSite(path="self_attn.q_proj", outputs="heads", inputs="hidden", fused=fused_qkv, bias=qkv),
        LinearSite(path="self_attn.k_proj", outputs="kv_heads", inputs="hidden", fused=fused_qkv, bias=qkv),
        LinearSite(path="self_attn.v_proj", outputs="kv_heads", inputs="hidden", fused=fused_qkv, bias=qkv),
        LinearSite(path="self_attn.o_proj", outputs="hidden", inputs="heads", bias=output),
        LinearSite(path="mlp.gate_proj", outputs="intermediate", inputs="hidden", fused=fused_mlp, bias=mlp),
        LinearSite(path="mlp.up_proj", outputs="intermediate", inputs="hidden", fused=fused_mlp, bias=mlp),
        LinearSite(path="mlp.down_proj", outputs="hidden", inputs="intermediate", bias=mlp),
    )


_PRE_NORMS = (("input_layernorm", "hidden"), ("post_attention_layernorm", "hidden"))
_HEAD_NORMS = (("self_attn.q_norm", "head_dim"), ("self_attn.k_norm", "head_dim"))

ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        linears=_attention_and_mlp(qkv="attention_bias", output="attention_bias", mlp="mlp_bias"),
        norms=_PRE_NORMS,
        norm_class="LlamaRMSNorm",
    ),
    "MistralForCausalLM": Architecture(linears=_attention_and_mlp(), norms=_PRE_NORMS, norm_class="MistralRMSNorm"),
    "Qwen2ForCausalLM": Architecture(
        linears=_attention_and_mlp(qkv=ALWAYS), norms=_PRE_NORMS, norm_class="Qwen2RMSNorm"
    ),
    "Qwen3ForCausalLM": Architecture(
        linears=_attention_and_mlp(qkv="attention_bias", output="attention_bias"),
        norms=_PRE_NORMS + _HEAD_NORMS,
        norm_class="Qwen3RMSNorm",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What planning needs to know of a model, read from its config.json."""

    name: str
    architecture: Architecture
    dtype: DType
    layers: int
    sizes: Mapping[str, int]
    vocabulary: int
    tied: bool
    biases: frozenset[str]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Model:
        """Read config.json (parsed).

        Raises `ConfigError` for an architecture that is no entry of `ARCHITECTURES`, and for sizes that are missing.
        """
        names = config.get("architectures") or ["none"]
        name = str(names[0] if isinstance(names, list) else names)
        if name not in ARCHITECTURES:
            raise ConfigError(
                Fault(
                    where="config.json: architectures",
                    expected="one of " + ", ".join(sorted(ARCHITECTURES)),
                    found=name,
                    remedy="This model family is not supported; nothing is guessed about where its weights belong.",
                )
            )
        faults = FaultCollector()
        sizes = _sizes(config, faults)
        layers = _size(config, "num_hidden_layers", faults)
        vocabulary = _size(config, "vocab_size", faults)
        dtype = _model_dtype(config, faults)
        faults.raise_if_any(ConfigError)
        return cls(
            name=name,
            architecture=ARCHITECTURES[name],
            dtype=dtype,
            layers=layers,
            sizes=sizes,
            vocabulary=vocabulary,
            tied=bool(config.get("tie_word_embeddings", False)),
            biases=frozenset({ALWAYS} | {key for key in ("attention_bias", "mlp_bias") if config.get(key)}),
        )

    def sites(self) -> Iterator[Site]:
        """Every module that must have a weight, in the model's own order; a tied lm_head is none."""
        hidden = self.sizes["hidden"]
        yield Site(module=EMBEDDING, class_name="Embedding", shape=(self.vocabulary, hidden))
        for layer in range(self.layers):
            prefix = f"{_LAYERS}.{layer}."
            for path, size in self.architecture.norms:
                yield Site(module=prefix + path, class_name=self.architecture.norm_class, shape=(self.sizes[size],))
            for site in self.architecture.linears:
                yield Site(
                    module=prefix + site.path,
                    class_name="Linear",
                    shape=(self.sizes[site.outputs], self.sizes[site.inputs]),
                    fused=prefix + site.fused if site.fused else None,
                    bias=site.bias in self.biases,
                )
        yield Site(module="model.norm", class_name=self.architecture.norm_class, shape=(hidden,))
        if not self.tied:
            yield Site(module=LM_HEAD, class_name="Linear", shape=(self.vocabulary, hidden))


def _sizes(config: Mapping[str, Any], faults: FaultCollector) -> dict[str, int]:
    """The sizes that `LinearSite` and the norms name; `heads` and `kv_heads` in elements, not in heads."""
    hidden = _size(config, "hidden_size", faults)
    heads = _size(config, "num_attention_heads", faults)
    kv_heads = _size(config, "num_key_value_heads", faults, default=heads)
    head_dim = _size(config, "head_dim", faults, default=hidden // heads if heads else 0)
    return {
        "hidden": hidden,
        "intermediate": _size(config, "intermediate_size", faults),
        "heads": heads * head_dim,
        "kv_heads": kv_heads * head_dim,
        "head_dim": head_dim,
    }


def _size(config: Mapping[str, Any], key: str, faults: FaultCollector, *, default: int | None = None) -> int:
    """A size; `default` where the key is absent or null."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    faults.add(
        where=f"config.json: {key}",
        expected="a positive integer",
        found=repr(value),
        remedy="Take config.json from the model that was quantized.",
    )
    return 0


def _model_dtype(config: Mapping[str, Any], faults: FaultCollector) -> DType:
    """`dtype` (transformers 5) or `torch_dtype` (transformers 4); bfloat16 where neither is there."""
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    try:
        dtype = DType.from_torch(name)
    except KeyError:
        dtype = None
    if dtype is not None and dtype.is_wide_float:
        return dtype
    faults.add(
        where="config.json: dtype",
        expected="bfloat16, float16 or float32",
        found=repr(name),
        remedy="Set the dtype that the model computes in.",
    )
    return DType.BF16
