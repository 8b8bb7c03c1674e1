"""What the two JSON files of an engine-build checkpoint say, against the source: every key, and no other key.

An engine is built from these values, and a class reads further keys as they come: a wrong or surplus one gives no
error. The values are read here from the source's config.json, apart from what wrote the directory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct.verify.engine_classes import class_of
from trtllm_ct.verify.engine_exclusions import exclusion_problems
from trtllm_ct.verify.engine_rope import rope_of_engine, rope_of_source, scaling_problem

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.verify.engine_classes import EngineClass
    from trtllm_ct.verify.engine_ranks import EngineRanks

__all__ = ["compare_statements"]

# The key of config.json of an engine, and the key of the source that has the same value.
_SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "norm_epsilon": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "head_size": "head_dim",
}
_FIXED = {
    "position_embedding_type": "rope_gpt_neox",
    "logits_dtype": "float32",
    "use_parallel_embedding": False,
    "embedding_sharding_dim": 0,
}
_ACTIVATIONS = frozenset({"silu", "swish"})
# Keys with a check of their own: here, in `engine_keys.py`, or in `engine_match.py` by the tensors.
_CHECKED_APART = frozenset(
    {"producer", "dtype", "attn_bias", "mlp_bias", "rotary_base", "rotary_scaling", "quantization", "mapping"}
)
_PLACING = ("architecture", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size")
"""The keys that say which modules there are, and which rows of them each rank has; shapes are compared apart."""
_PLAIN_INT8 = "W8A16"
_MIXED = "MIXED_PRECISION"
_MISSING = "no such key"
_CONFIG = "config.json"
_LAYERS = "quant_cfg.json"
_GROUP_SIZES = {"W4A16_AWQ": (64, 128), "W4A16_GPTQ": (64, 128), "W8A16_GPTQ": (64, 128), "NVFP4": (16,)}
_OTHER_GROUP_SIZES = (128,)
_ZEROS = {"W4A16_AWQ": (False, True), "W4A16_GPTQ": (True,), "W8A16_GPTQ": (True,)}
_PREQUANT = {"W4A16_AWQ": (False, True)}
_NO = (False,)


def compare_statements(source: Mapping[str, Any], ranks: EngineRanks, *, tied: bool, faults: FaultCollector) -> bool:
    """Add a fault for each statement that contradicts the source, and for each file that is none of the directory.

    `source` is the config.json of the source; `tied` says whether its head is the embedding. Returns whether the
    statements place every module as the source has it, without which tensors can't be compared.
    """
    return _Statements(source=source, ranks=ranks, row=class_of(source), faults=faults).compare(tied=tied)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Statements:
    """Compares the statements of one directory with those of its source, whose class has the row `row`."""

    source: Mapping[str, Any]
    ranks: EngineRanks
    row: EngineClass
    faults: FaultCollector

    @property
    def engine(self) -> Mapping[str, Any]:
        """The config.json of the engine."""
        return self.ranks.config

    def compare(self, *, tied: bool) -> bool:
        """Add all faults; return whether the statements that place modules have none."""
        expected = self._expected(tied=tied)
        for key, value in expected.items():
            self._compare(key, value, self.engine.get(key, _MISSING))
        for key in sorted(self.engine.keys() - expected.keys() - _CHECKED_APART):
            self._compare(key, _MISSING, self.engine[key])
        self._compare_rope()
        self._compare_block("mapping.", self._mapping(), self.engine["mapping"])
        self._compare_quantization()
        self._refuse_other_files()
        return all(_equal(expected.get(key), self.engine.get(key)) for key in _PLACING)

    def _expected(self, *, tied: bool) -> dict[str, Any]:
        """Return the keys of config.json with the value that each must have."""
        named = str(self.source.get("hidden_act") or "silu")
        plain_int8 = self.ranks.quantization["quant_algo"] == _PLAIN_INT8
        expected = _FIXED | dict(self.row.fixed) | {key: self._size(name) for key, name in _SAME.items()}
        expected |= {
            "architecture": (self.source.get("architectures") or [None])[0],
            "hidden_act": self.row.hidden_act if named in _ACTIVATIONS else named,
            "tie_word_embeddings": tied,
            "disable_weight_only_quant_plugin": plain_int8,
        }
        if self.row.experts:
            experts = {"num_experts": "num_local_experts", "top_k": "num_experts_per_tok"}
            # Probabilities of the chosen experts add up to 1 (`MoeConfig.ExpertScaleNormalizationMode.RENORMALIZE`).
            expected["moe"] = {key: self._size(name) for key, name in experts.items()} | {"normalization_mode": 1}
        return expected

    def _size(self, name: str) -> Any:
        """Return a number of the source, or what its class takes for it."""
        value = self.source.get(name)
        if value is None and name not in self.source:
            value = self.row.defaults.get(name)
        if value is not None:
            return float(value) if name == "rms_norm_eps" else value
        if name == "num_key_value_heads":
            return self._size("num_attention_heads")
        if name == "head_dim":
            return self._size("hidden_size") // self._size("num_attention_heads")
        return self.row.defaults.get(name)

    def _mapping(self) -> dict[str, int]:
        """Return the block `mapping`; `engine_keys.py` has checked its sizes."""
        tensor, pipeline = self.ranks.tensor, self.ranks.pipeline
        sizes = {"world_size": tensor * pipeline, "tp_size": tensor, "pp_size": pipeline}
        return sizes | ({"moe_tp_size": tensor, "moe_ep_size": 1} if self.row.experts else {})

    def _compare_rope(self) -> None:
        rope, built = rope_of_source(self.source), rope_of_engine(self.engine)
        self._compare("rotary_base", rope.pop("base"), built.pop("base") if "rotary_base" in self.engine else None)
        kind = str(rope["kind"])
        for key, value in rope.items() if kind == built["kind"] else [("kind", kind)]:
            self._compare(f"rotary_scaling.{key}", value, built.get(key))
        scaling = self.engine.get("rotary_scaling", _MISSING)
        problem = scaling_problem(scaling, kind)
        if problem:
            self._compare("rotary_scaling", problem, scaling)

    def _compare_quantization(self) -> None:
        """Compare the block `quantization`, and quant_cfg.json if it has the modes of Linears."""
        block, mixed = self.ranks.quantization, self.ranks.layer_modes
        if mixed is None:
            self._compare_mode("quantization.", block, also={"kv_cache_quant_algo", "exclude_modules"})
            patterns, algo = block["exclude_modules"], block["quant_algo"]
            for found, expected in exclusion_problems(patterns, algo, self.ranks.layers_of_stage):
                self._compare("quantization.exclude_modules", expected, found)
            return
        both = {"quant_algo": _MIXED, "kv_cache_quant_algo": mixed["kv_cache_quant_algo"]}
        self._compare_block("quantization.", both, block)
        layers = mixed["quantized_layers"]
        self._compare_block("", both | {"quantized_layers": layers}, mixed, file=_LAYERS)
        for name, mode in layers.items():
            if name not in self.ranks.linears:
                self._compare(name, "the name of a Linear: patterns would be read for others too", name, file=_LAYERS)
            self._compare_mode(f"{name}.", mode, file=_LAYERS)

    def _compare_mode(
        self, prefix: str, block: Mapping[str, Any], *, also: Collection[str] = (), file: str = _CONFIG
    ) -> None:
        """Compare what a block says of its mode where tensors don't show it; `also` are further keys that it has."""
        algo = str(block["quant_algo"])
        choices = {
            "group_size": _GROUP_SIZES.get(algo, _OTHER_GROUP_SIZES),
            "has_zero_point": _ZEROS.get(algo, _NO),
            "pre_quant_scale": _PREQUANT.get(algo, _NO),
        }
        expected = {"quant_algo": block["quant_algo"], **{key: block.get(key) for key in also}}
        for key, values in choices.items():
            expected[key] = block[key] if block[key] in values else values[0]
        self._compare_block(prefix, expected, block, file=file)

    def _compare_block(
        self, prefix: str, expected: Mapping[str, Any], found: Mapping[str, Any], *, file: str = _CONFIG
    ) -> None:
        """Compare the keys of a block and their values; others are arguments that its class in the engine refuses."""
        for key, value in expected.items():
            self._compare(prefix + key, value, found.get(key, _MISSING), file=file)
        for key in sorted(found.keys() - expected.keys()):
            self._compare(prefix + key, _MISSING, found[key], file=file)

    def _compare(self, key: str, expected: object, found: object, *, file: str = _CONFIG) -> None:
        """Add a fault if a value is another one; true is no number."""
        if not _equal(expected, found):
            self.faults.add(
                where=f"{self.ranks.directory}: {file}: {key}",
                expected=f"{expected}, as the source says",
                found=str(found),
                remedy="Convert again into an empty directory.",
            )

    def _refuse_other_files(self) -> None:
        """Add a fault for each visible file that a directory of so many ranks doesn't have."""
        names = {_CONFIG} | ({_LAYERS} if self.ranks.layer_modes is not None else set())
        names |= {f"rank{rank}.safetensors" for rank in range(self.ranks.tensor * self.ranks.pipeline)}
        for path in sorted(self.ranks.directory.iterdir()):
            if path.name not in names and not path.name.startswith("."):
                self.faults.add(
                    where=str(path),
                    expected="only config.json and a file for each rank",
                    found="another file, which may be of another conversion",
                    remedy="Delete it, or convert again into an empty directory.",
                )


def _equal(expected: object, found: object) -> bool:
    """Whether two values are equal, nested ones included; true is not 1."""
    if isinstance(expected, bool) or isinstance(found, bool):
        return expected is found
    if isinstance(expected, dict) and isinstance(found, dict):
        return expected.keys() == found.keys() and all(_equal(value, found[key]) for key, value in expected.items())
    if isinstance(expected, int) and not isinstance(found, int):
        return False
    return expected == found
