"""Every claimed architecture by every scheme for every release: what is delivered is what the builder stored.

Weights, biases, norms and modes of converted directories are compared with the exact values of the builder, by decoders
that share nothing with the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import Built, tiny_config, write_checkpoint
from modelopt_weights import PLAIN, decoded_weight, delivered_modes, delivered_tensors, rounded_once
from multimodal import renamed, write_multimodal
from tiny_models import linears

from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.plan.models.class_rows import CLASS_ROWS
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

RELEASES = ("stock-1.0", "stock-1.2", "stock-1.3")
MODES = {
    "int4-g128": "W4A16_AWQ",
    "int8-channel": "W8A16",
    "fp8-channel-token": "FP8_PER_CHANNEL_PER_TOKEN",
    "fp8-block": "FP8_BLOCK_SCALES",
    "nvfp4": "NVFP4",
}
"""The mode that each scheme was made for."""
WITH_CACHE = frozenset({"fp8-block", "nvfp4"})
"""The schemes that are stored together with scales of an FP8 KV cache."""
NO_CACHE_SCALES = {
    "Phi3ForCausalLM": "the class passes on no scales of K and V",
    "DeepseekV2ForCausalLM": "latent attention has no K and V projections",
    "DeepseekV3ForCausalLM": "latent attention has no K and V projections",
}
"""Architectures whose cache has scale 1 in the engine, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A checkpoint: the class of its text model, further keys of config.json, and the class around it, if any.

    `stored` and `read` are the prefixes of the text model's body in the files and in what the engine's class reads.
    """

    text: str
    more: Mapping[str, Any]
    wrapper: str | None = None
    kinds: tuple[str, str] = ("", "")
    stored: str = "model."
    read: str = "model."

    @property
    def architecture(self) -> str:
        return self.wrapper or self.text


_BIAS = {"attention_bias": True}
_EXPERTS = {"moe_intermediate_size": 256}
_SHARED = {"shared_expert_intermediate_size": 256, **_EXPERTS}
# Every size is a multiple of 128, so that each scheme can store, and each mode hold, every Linear.
_LATENT = {
    "head_dim": None,
    "num_key_value_heads": 8,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    **_EXPERTS,
}
_LITE = {**_LATENT, "q_lora_rank": None}
_INNER, _OUTER = "language_model.model.", "model.language_model."
ROWS: dict[str, Row] = {
    "llama": Row(text="LlamaForCausalLM", more={}),
    "llama, biases": Row(text="LlamaForCausalLM", more={**_BIAS, "mlp_bias": True}),
    "mistral": Row(text="MistralForCausalLM", more={}),
    "qwen2": Row(text="Qwen2ForCausalLM", more={}),
    "qwen3, biases": Row(text="Qwen3ForCausalLM", more=_BIAS),
    "granite, biases": Row(text="GraniteForCausalLM", more={**_BIAS, "mlp_bias": True}),
    "gemma2, biases": Row(text="Gemma2ForCausalLM", more=_BIAS),
    "gemma3": Row(text="Gemma3ForCausalLM", more={}),
    "gemma3, biases": Row(text="Gemma3ForCausalLM", more=_BIAS),
    "phi3": Row(text="Phi3ForCausalLM", more={"num_attention_heads": 4}),
    "mixtral": Row(text="MixtralForCausalLM", more={}),
    "qwen2-moe": Row(text="Qwen2MoeForCausalLM", more=_SHARED),
    "qwen3-moe": Row(text="Qwen3MoeForCausalLM", more=_EXPERTS),
    "qwen3-moe, biases": Row(text="Qwen3MoeForCausalLM", more={**_EXPERTS, **_BIAS}),
    "deepseek-v2": Row(text="DeepseekV2ForCausalLM", more=_LATENT),
    "deepseek-v2 lite": Row(text="DeepseekV2ForCausalLM", more=_LITE),
    "deepseek-v3": Row(text="DeepseekV3ForCausalLM", more=_LATENT),
    "deepseek-v3, biases": Row(text="DeepseekV3ForCausalLM", more={**_LATENT, **_BIAS}),
    "gemma3-vl": Row(
        text="Gemma3ForCausalLM",
        more={},
        wrapper="Gemma3ForConditionalGeneration",
        kinds=("gemma3", "gemma3_text"),
        stored=_OUTER,
        read=_INNER,
    ),
    "mistral3": Row(
        text="MistralForCausalLM",
        more={},
        wrapper="Mistral3ForConditionalGeneration",
        kinds=("mistral3", "mistral"),
        stored=_OUTER,
        read=_INNER,
    ),
    "qwen2-vl": Row(
        text="Qwen2ForCausalLM",
        more={},
        wrapper="Qwen2VLForConditionalGeneration",
        kinds=("qwen2_vl", "qwen2_vl_text"),
    ),
    "qwen2.5-vl": Row(
        text="Qwen2ForCausalLM",
        more={},
        wrapper="Qwen2_5_VLForConditionalGeneration",
        kinds=("qwen2_5_vl", "qwen2_5_vl_text"),
        stored=_OUTER,
        read=_OUTER,
    ),
    "qwen3-vl, biases": Row(
        text="Qwen3ForCausalLM",
        more=_BIAS,
        wrapper="Qwen3VLForConditionalGeneration",
        kinds=("qwen3_vl", "qwen3_vl_text"),
        stored=_OUTER,
        read=_OUTER,
    ),
    "qwen3-vl-moe": Row(
        text="Qwen3MoeForCausalLM",
        more=_EXPERTS,
        wrapper="Qwen3VLMoeForConditionalGeneration",
        kinds=("qwen3_vl_moe", "qwen3_vl_moe_text"),
        stored=_OUTER,
        read=_OUTER,
    ),
    "kimi-k2.5": Row(
        text="DeepseekV3ForCausalLM",
        more=_LATENT,
        wrapper="KimiK25ForConditionalGeneration",
        kinds=("kimi_k25", "kimi_k2"),
        stored=_INNER,
        read=_INNER,
    ),
    "llava-next": Row(
        text="MistralForCausalLM",
        more={},
        wrapper="LlavaNextForConditionalGeneration",
        kinds=("llava_next", "mistral"),
        stored=_INNER,
        read=_INNER,
    ),
}

FIRST_RELEASE = {
    "GraniteForCausalLM": None,
    "Gemma2ForCausalLM": None,
    "DeepseekV2ForCausalLM": None,
    "Qwen3VLForConditionalGeneration": "stock-1.2",
    "Qwen3VLMoeForConditionalGeneration": "stock-1.2",
    "KimiK25ForConditionalGeneration": "stock-1.3",
}
"""Classes that some releases lack, with the first release that has them; all others are in every release."""

# Modules that are delivered plain although they are stored quantized, and why.
EXPERTS_WITHOUT_MODE = {
    "int4-g128": "no release has int4 experts with 16-bit activations",
    "fp8-channel-token": "no release has experts of row-wise FP8",
}
BIAS_DROPPED = {("int8-channel", "stock-1.0"), ("int8-channel", "stock-1.2")}
"""Weight-only Linears return the GEMM without the bias until pull request 12317."""
NOT_CUT = {
    **{
        ("int4-g128", release): "two rows of codes are one row of bytes, so scales have other rows"
        for release in RELEASES
    },
    **{("int8-channel", release): "scales are cut with two indices, and W8A16 reads [N]" for release in RELEASES},
    **{("fp8-block", release): "a row of scales stands for 128 rows of codes, so it isn't cut" for release in RELEASES},
    **{
        ("fp8-channel-token", release): "scales are cut with two indices, and Linears read [N] until stock-1.3"
        for release in RELEASES[:2]
    },
}
"""`Phi3ForCausalLM.load_weights` cuts stored fused weights by rows, and their scales where both have as many."""
READ_PLAIN = {"kv_b_proj": "the engine absorbs it into attention"}
JOINED = {"q_a_proj", "kv_a_proj_with_mqa"}
"""The engine's class joins these itself, with block scales only."""


def test_every_claimed_architecture_is_a_row() -> None:
    assert {row.text for row in ROWS.values()} == {name for name, row in CLASS_ROWS.items() if row.leaves}


def config_of(row: Row) -> dict[str, Any]:
    sizes: dict[str, Any] = {"hidden": 128, "heads": 8, "kv_heads": 4, "intermediate": 256, "head_dim": 32}
    layers = 2 if row.text.startswith("Deepseek") else 1
    config = tiny_config(row.text, layers=layers, **(sizes | dict(row.more)))
    # A key that is left out has the default of the class, which is a number.
    return config | {key: None for key in ("q_lora_rank",) if key in row.more and row.more[key] is None}


def write(directory: Path, row: Row, scheme: str) -> Built:
    config = config_of(row)
    if row.wrapper is None:
        return write_checkpoint(directory, config=config, scheme=scheme, kv=scheme in WITH_CACHE)
    more = {"text": config, "architecture": row.wrapper, "kinds": row.kinds}
    return write_multimodal(directory, row.stored, scheme=scheme, kv=scheme in WITH_CACHE, **more)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Built]:
    """Return each checkpoint, which is written once."""
    written: dict[tuple[str, str], Built] = {}

    def get(name: str, scheme: str) -> Built:
        if (name, scheme) not in written:
            written[name, scheme] = write(tmp_path_factory.mktemp("stored") / "in", ROWS[name], scheme)
        return written[name, scheme]

    return get


def lacks(row: Row, release: str) -> bool:
    """Whether a release lacks the class of a checkpoint. Its directory is written with a problem, and is right."""
    first = FIRST_RELEASE.get(row.architecture, RELEASES[0])
    return first is None or RELEASES.index(first) > RELEASES.index(release)


def expected_modes(row: Row, scheme: str, release: str) -> dict[str, str]:
    """Return the mode of every Linear, by the name that it has in a text model."""
    modes = {}
    for module, _, biased in linears(config_of(row)):
        leaf = module.rpartition(".")[2]
        expert = ".experts." in module
        plain = (
            leaf in {"lm_head", "gate", "shared_expert_gate"}
            or leaf in READ_PLAIN
            or (leaf in JOINED and scheme != "fp8-block")
            or (expert and (scheme in EXPERTS_WITHOUT_MODE or row.wrapper == "Qwen3VLMoeForConditionalGeneration"))
            or (biased and (scheme, release) in BIAS_DROPPED)
            or (row.text == "Phi3ForCausalLM" and leaf in {"qkv_proj", "gate_up_proj"} and (scheme, release) in NOT_CUT)
        )
        modes[module] = PLAIN if plain else MODES[scheme]
    return modes


def split_stacks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace tensors [E, in, out] of all experts by the weights of each."""
    for name in [name for name in tensors if tensors[name].dim() == 3]:
        experts, _, leaf = name.rpartition(".")
        for expert, weight in enumerate(tensors.pop(name)):
            parts = zip(("gate_proj", "up_proj"), weight.T.chunk(2), strict=True)
            for projection, part in parts if leaf == "gate_up_proj" else [(leaf, weight.T)]:
                tensors[f"{experts}.{expert}.{projection}.weight"] = part
    return tensors


def wrong_tensors(
    built: Built, tensors: Mapping[str, Tensor], modes: Mapping[str, str], rename: Callable[[str], str]
) -> list[str]:
    """Return the tensors of the model that are missing or that are not the stored values, by their new names."""
    wrong = []
    for name, exact in built.dense.items():
        new = rename(name)
        module = new.rpartition(".")[0]
        mode = modes.get(module, PLAIN) if name.endswith(".weight") else PLAIN
        if f"{module}.weight" not in tensors or (mode == PLAIN and new not in tensors):
            wrong.append(f"{new} is missing")
        elif mode == PLAIN:
            if not torch.equal(tensors[new].double(), rounded_once(exact, tensors[new].dtype)):
                wrong.append(f"{new} is not the exact value, rounded once")
        else:
            below = {
                key.removeprefix(f"{module}."): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{module}.")
            }
            # A quotient of two global scales is rounded to float32; all other products are exact.
            bound = exact.abs() * (2.0**-23 if mode == "NVFP4" else 0)
            if not ((decoded_weight(mode, below) - exact).abs() <= bound).all():
                wrong.append(f"{new} has other values in {mode}")
    return wrong


def cache_scales(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(tensor) for name, tensor in tensors.items() if name.endswith((".k_scale", ".v_scale"))}


def expected_cache_scales(row: Row, built: Built, rename: Callable[[str], str]) -> dict[str, float]:
    """Return the scales of K and V under the projections whose outputs they are for."""
    if row.text in NO_CACHE_SCALES:
        return {}
    return {
        rename(name.replace("self_attn.", f"self_attn.{name[-7]}_proj.")): scale
        for name, scale in cache_scales(built.stored).items()
    }


UNREAD_BIASES = {
    "gemma3, biases": "model.layers.0.self_attn.q_proj.bias and 3 more",
    "deepseek-v3, biases": "model.layers.0.self_attn.q_a_proj.bias and 5 more",
}
"""The problems of models with biases that the engine's class builds no parameter for."""


@pytest.mark.pairs
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("scheme", MODES)
@pytest.mark.parametrize("name", ROWS)
def test_modelopt(stored: Callable[[str, str], Built], tmp_path: Path, name: str, scheme: str, release: str) -> None:
    row, built, out = ROWS[name], stored(name, scheme), tmp_path / "out"

    def rename(module: str) -> str:
        return renamed(module, row.read) if row.wrapper else module

    report = convert_checkpoint(built.directory, out, engine=release)
    tensors = delivered_tensors(out)
    modes = delivered_modes(out, tensors)

    expected = {rename(module): mode for module, mode in expected_modes(row, scheme, release).items()}
    tensors = split_stacks(tensors)
    unread = [UNREAD_BIASES[name]] if name in UNREAD_BIASES else []
    problems = ["config.json: architectures"] * lacks(row, release) + unread
    assert [fault.where for fault in report.plan.problems] == problems
    assert {module: modes.get(module, PLAIN) for module in expected} == expected
    assert wrong_tensors(built, tensors, modes, rename) == []
    assert cache_scales(tensors) == expected_cache_scales(row, built, rename)
    assert verify_checkpoint(built.directory, out).good


@pytest.mark.parametrize("scheme", MODES)
@pytest.mark.parametrize("name", ROWS)
def test_dense(stored: Callable[[str, str], Built], tmp_path: Path, name: str, scheme: str) -> None:
    row, built, out = ROWS[name], stored(name, scheme), tmp_path / "out"

    convert_checkpoint(built.directory, out, to="dense")

    tensors = split_stacks(delivered_tensors(out))
    assert cache_scales(tensors) == {}
    assert (
        wrong_tensors(built, tensors, {}, lambda module: renamed(module, row.stored) if row.wrapper else module) == []
    )
    assert verify_checkpoint(built.directory, out).good
