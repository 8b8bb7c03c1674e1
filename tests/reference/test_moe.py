"""Mixture-of-experts models: tiny random models of many families, with experts delivered in every form."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from installed_transformers import in_dtype
from safetensors.torch import load_file, save_file

from trtllm_ct.base.errors import PlanError
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.quant_config import LayerQuantConfig, QuantConfig
from trtllm_ct.reference import ReferenceLinear, build_model, load_model
from trtllm_ct.reference import names as name_tables

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.reference

EVERY_FAMILY = [
    *("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "exaone_moe", "glm4_moe"),
    *("granitemoe", "granitemoeshared", "hy_v3", "laguna", "lfm2_moe", "mimo_v2_flash", "minimax", "minimax_m2"),
    "phimoe",
]
# Their logits are compared in tests/end_to_end/test_class_rows.py and
# tests/serve/test_{decoder,own_loader,stacked}_rows.py.
BY_ROW = ["deepseek_v4", "gemma4_text", "nemotron_h", "qwen3_5_text"]


def known(families: list[str]) -> list[str]:
    """Those of the families that the installed transformers has; older releases lack some."""
    if importlib.util.find_spec("transformers") is None:
        return families
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return [family for family in families if family in CONFIG_MAPPING_NAMES]


FAMILIES = known(EVERY_FAMILY)
QUANTIZED = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"]
TOKENS = torch.arange(2, 22)[None]
MIXTRAL = "model.layers.1.block_sparse_moe"
W8A16 = LayerQuantConfig(quant_algo=QuantAlgo.W8A16)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def transformers_model(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, **in_dtype(dtype)).eval()


def read_tensors(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def read_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def build(directory: Path, tensors: dict[str, Tensor], quant_config: QuantConfig | None = None, **fields: Any) -> Any:
    """Build a model from a directory's config, with `fields` replaced, and from `tensors`."""
    config = read_config(directory) | fields
    return build_model(
        config, quant_config, tensors.items(), dtype=torch.float32, quantize_activations=False, name="tiny"
    )


def expert_linears(tensors: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in tensors if ".experts." in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_mixtures_equal_transformers(save_tiny: Callable[..., Path], family: str) -> None:
    directory = save_tiny(family)

    got = load_model(directory, dtype=torch.float32)

    assert torch.allclose(logits(transformers_model(directory)), logits(got), atol=1e-6)


def test_every_family_with_renamed_modules_is_tested() -> None:
    assert set(name_tables._RENAMED) <= {*EVERY_FAMILY, *BY_ROW}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_router_is_as_exact_as_in_transformers(save_tiny: Callable[..., Path], family: str) -> None:
    """Every tensor has the dtype that transformers gives it; the bias of DeepSeek's router stays in float32."""
    directory = save_tiny(family)

    want, got = transformers_model(directory, torch.bfloat16), load_model(directory, dtype=torch.bfloat16)

    wanted = {name: tensor.dtype for name, tensor in want.state_dict().items() if "experts." not in name}
    assert wanted == {name: tensor.dtype for name, tensor in got.state_dict().items() if "experts." not in name}
    assert torch.allclose(logits(want), logits(got), atol=0.02)


def quantize_experts(
    tensors: dict[str, Tensor], random_linear: Any, algo: QuantAlgo = QuantAlgo.W8A16
) -> tuple[dict[str, Tensor], dict[str, LayerQuantConfig]]:
    """Replace the weights of all experts by random quantized tensors; return all tensors and the experts' modes."""
    quantized, layers = dict(tensors), {}
    for seed, name in enumerate(expert_linears(tensors)):
        shape = quantized.pop(f"{name}.weight").shape
        layers[name], delivered = random_linear(algo, *shape, seed)
        quantized |= {f"{name}.{local}": tensor for local, tensor in delivered.items()}
    return quantized, layers


@pytest.mark.parametrize("algo", [QuantAlgo.W8A16, QuantAlgo.NVFP4, QuantAlgo.FP8])
@pytest.mark.parametrize("family", QUANTIZED)
def test_quantized_experts_equal_the_model_of_their_decoded_weights(
    save_tiny: Callable[..., Path], random_linear: Any, decode_slowly: Any, family: str, algo: QuantAlgo
) -> None:
    directory = save_tiny(family)
    dense = read_tensors(directory)
    tensors, layers = quantize_experts(dense, random_linear, algo)
    for name in layers:
        delivered = {
            local: tensors[f"{name}.{local}"]
            for local in ("weight", "weight_scale", "weight_scale_2")
            if f"{name}.{local}" in tensors
        }
        dense[f"{name}.weight"] = decode_slowly(algo, delivered).float()
    save_file(dense, directory / "model.safetensors", {"format": "pt"})

    got = build(directory, tensors, QuantConfig(quantized_layers=layers))

    want = logits(transformers_model(directory))
    assert torch.allclose(want, logits(got), atol=1e-5 * want.abs().max())
    experts = [module for name, module in got.named_modules() if name.endswith(".experts")]
    assert sum(isinstance(linear, ReferenceLinear) for stack in experts for linear in stack.modules()) == len(layers)


def test_one_entry_may_name_all_experts_of_a_layer(save_tiny: Callable[..., Path], random_linear: Any) -> None:
    directory = save_tiny("qwen3_moe")
    tensors, layers = quantize_experts(read_tensors(directory), random_linear)
    layer_entries = {f"model.layers.{layer}.mlp.experts": W8A16 for layer in range(2)}
    not_experts = {name.removesuffix(".weight") for name in tensors if name.removesuffix(".weight") not in layers}

    one_by_one = build(directory, tensors, QuantConfig(quantized_layers=layers))
    by_layer = build(directory, tensors, QuantConfig(quantized_layers=layer_entries))
    by_exclusion = build(directory, tensors, QuantConfig(layer=W8A16, exclude_modules=tuple(not_experts)))

    assert torch.equal(logits(one_by_one), logits(by_layer))
    assert torch.equal(logits(one_by_one), logits(by_exclusion))


def test_experts_hold_what_was_delivered(save_tiny: Callable[..., Path], random_linear: Any) -> None:
    directory = save_tiny("qwen2_moe")
    tensors, layers = quantize_experts(read_tensors(directory), random_linear)

    state = build(directory, tensors, QuantConfig(quantized_layers=layers)).state_dict()

    assert state.keys() == tensors.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in tensors)


@pytest.mark.parametrize("family", QUANTIZED)
def test_plain_stacks_of_experts_are_taken_as_they_are(save_tiny: Callable[..., Path], family: str) -> None:
    """`experts.gate_up_proj` [E, 2I, H] and `experts.down_proj` [E, H, I]: what transformers itself holds."""
    model = transformers_model(save_tiny(family))
    renamed = {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in model.state_dict().items()}
    tensors = renamed if family == "mixtral" else model.state_dict()

    got = build(save_tiny(family), tensors)

    assert torch.equal(logits(model), logits(got))


@pytest.mark.parametrize(("stored", "wanted"), [(("w1", "w3", "w2"), "qwen3_moe"), (None, "mixtral")])
def test_both_spellings_mean_the_same_in_every_family(
    save_tiny: Callable[..., Path], stored: tuple[str, str, str] | None, wanted: str
) -> None:
    """llm-compressor writes gate_proj, up_proj and down_proj for Mixtral too."""
    directory = save_tiny(wanted)
    gate_up_down = ("gate_proj", "up_proj", "down_proj")
    old, new = (gate_up_down, stored) if stored else (("w1", "w3", "w2"), gate_up_down)
    tensors = {}
    for name, tensor in read_tensors(directory).items():
        for old_name, new_name in zip(old, new, strict=True):
            name = name.replace(f".{old_name}.weight", f".{new_name}.weight") if ".experts." in name else name  # noqa: PLW2901
        tensors[name] = tensor

    assert torch.equal(logits(load_model(directory, dtype=torch.float32)), logits(build(directory, tensors)))


@pytest.mark.parametrize(
    ("family", "experts", "kept"), [("mixtral", "num_local_experts", 3), ("deepseek_v3", "n_routed_experts", 4)]
)
@pytest.mark.parametrize("stacked", [False, True])
def test_pruned_experts_need_a_pruned_router(
    save_tiny: Callable[..., Path], family: str, experts: str, kept: int, stacked: bool
) -> None:
    """A model whose layers and routers have fewer experts than config.json says equals one whose config is right."""
    directory = save_tiny(family, **{experts: kept})
    tensors = transformers_model(directory).state_dict() if stacked else read_tensors(directory)

    got = build(directory, tensors, **{experts: 8})

    assert torch.allclose(logits(transformers_model(directory)), logits(got), atol=1e-6)


def test_layers_may_be_pruned_differently(save_tiny: Callable[..., Path]) -> None:
    directory = save_tiny("mixtral")
    tensors = {name: t for name, t in read_tensors(directory).items() if not name.startswith(f"{MIXTRAL}.experts.3.")}
    tensors[f"{MIXTRAL}.gate.weight"] = tensors[f"{MIXTRAL}.gate.weight"][:3].clone()

    model = build(directory, tensors)

    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    assert [len(module) for module in experts] == [4, 3]
    assert logits(model).isfinite().all()


INT8 = torch.ones(32, 32, dtype=torch.int8)
EXPERT = f"{MIXTRAL}.experts"
STACKS = {f"{EXPERT}.gate_up_proj": torch.zeros(4, 64, 32), f"{EXPERT}.down_proj": torch.zeros(4, 32, 32)}
ALL_MODES = {f"{EXPERT}.{expert}.{name}": W8A16 for expert in range(4) for name in ("w1", "w2", "w3")}


@pytest.mark.parametrize(
    ("removed", "added", "layers", "where", "found", "remedy"),
    [
        ("experts.3.", {}, {}, EXPERT, "no 3.w1, 3.w3, 3.w2", "no shard is missing"),
        ("experts.2.w3.", {}, {}, EXPERT, "no 2.w3", "no shard is missing"),
        ("experts.", {}, {}, EXPERT, "neither", "no shard is missing"),
        (None, STACKS, {}, EXPERT, "both", "delivered once"),
        (None, {f"{EXPERT}.4.w1.weight": torch.zeros(32, 32)}, {}, EXPERT, "experts 4 too", "router"),
        (None, {f"{EXPERT}.0.up_proj.weight": torch.zeros(32, 32)}, {}, EXPERT, "up_proj, w1, w2, w3", "one way"),
        (None, {f"{EXPERT}.0.w4.weight": torch.zeros(32, 32)}, {}, f"{EXPERT}.0.w4.weight", "float32", "prefix"),
        (None, {f"{EXPERT}.0.w1.bias": torch.zeros(32)}, {}, f"{EXPERT}.0.w1.bias", "float32 [32]", "config.json"),
        (None, {f"{EXPERT}.1.w1.weight": INT8}, {}, f"{EXPERT}.1.w1.weight", "int8 [32, 32]", "quant_config"),
        (None, {f"{EXPERT}.1.w2.weight": torch.zeros(32, 16)}, {}, f"{EXPERT}.1.w2.weight", "[32, 16]", "config.json"),
        (None, {}, {f"{EXPERT}.1.w1": W8A16}, EXPERT, "none for 0.w1, W8A16 for 1.w1", "one kernel"),
        (None, {}, {f"{EXPERT}.7.w1": W8A16}, f"quantized_layers: {EXPERT}.7.w1", "no tensors", "spelling"),
        (None, {}, {f"{EXPERT}.0.up_proj": W8A16}, f"quantized_layers: {EXPERT}.0.up_proj", "no tensors", "spelling"),
        ("experts.", STACKS, ALL_MODES, EXPERT, "plain stacks", "exclude_modules"),
        (None, {}, ALL_MODES, f"{EXPERT}.3.w2", "no weight_scale", "exclude_modules"),
        ("experts.", STACKS, {EXPERT: W8A16}, EXPERT, "plain stacks", "exclude_modules"),
        (None, {}, {f"{MIXTRAL}.gate": W8A16}, f"quantized_layers: {MIXTRAL}.gate", "none of that name", "prefix"),
        (None, {f"{MIXTRAL}.gate.weight": torch.zeros(3, 32)}, {}, EXPERT, "experts 3 too", "router"),
        (None, {f"{MIXTRAL}.gate.weight": torch.zeros(1, 32)}, {}, EXPERT, "1", "chooses"),
        (None, {f"{MIXTRAL}.gate.weight": torch.zeros(5, 32)}, {}, f"{MIXTRAL}.gate.weight", "[5, 32]", "config.json"),
        (None, {f"{MIXTRAL}.gate.weight": torch.ones(())}, {}, f"{MIXTRAL}.gate.weight", "float32 []", "config.json"),
        (None, {f"{MIXTRAL}.gate.weight": None}, {}, f"{MIXTRAL}.gate.weight", "none", "no shard is missing"),
        ("experts.", STACKS | {f"{MIXTRAL}.gate.weight": torch.zeros(3, 32)}, {}, EXPERT, "3 in gate", "together"),
    ],
)  # fmt: skip
def test_incomplete_experts_are_faults_that_name_the_tensors_of_the_file(
    save_tiny: Callable[..., Path],
    removed: str | None,
    added: dict[str, Tensor | None],
    layers: dict[str, LayerQuantConfig],
    where: str,
    found: str,
    remedy: str,
) -> None:
    directory = save_tiny("mixtral")
    prefix = f"{MIXTRAL}.{removed}" if removed else "-"
    kept = {name: tensor for name, tensor in read_tensors(directory).items() if not name.startswith(prefix)}
    tensors = {name: tensor for name, tensor in (kept | added).items() if tensor is not None}

    with pytest.raises(PlanError) as caught:
        build(directory, tensors, QuantConfig(quantized_layers=layers))

    assert any(f.where == where and found in f.found and remedy in f.remedy for f in caught.value.faults), caught.value


def test_groups_of_experts_must_stay_equal(save_tiny: Callable[..., Path]) -> None:
    directory = save_tiny("deepseek_v3", n_routed_experts=3, n_group=1)

    with pytest.raises(PlanError, match=r"expected at least 2 experts, in 2 groups of one size, found 3"):
        build(directory, read_tensors(directory), n_routed_experts=4, n_group=2)


@pytest.mark.newest_transformers
def test_experts_with_more_than_gate_up_and_down_are_refused_once_a_layer(save_tiny: Callable[..., Path]) -> None:
    """gpt-oss has biases and interleaves gate and up; its unquantized stacks are left to transformers."""
    directory = save_tiny("gpt_oss")
    tensors = read_tensors(directory)
    singles = {f"model.layers.0.mlp.experts.{e}.gate_proj.weight": torch.zeros(32, 32) for e in range(4)}

    assert torch.equal(logits(transformers_model(directory)), logits(build(directory, tensors)))
    with pytest.raises(PlanError, match=r"^model\.layers\.0\.mlp\.experts: expected the two stacks of GptOssExperts"):
        build(directory, tensors | singles)


def test_kimi_k2_is_deepseek_v3_under_another_name(save_tiny: Callable[..., Path]) -> None:
    directory = save_tiny("deepseek_v3")
    want = logits(load_model(directory, dtype=torch.float32))
    (directory / "config.json").write_text(json.dumps(read_config(directory) | {"model_type": "kimi_k2"}))

    assert torch.equal(want, logits(load_model(directory, dtype=torch.float32)))


def test_layers_that_predict_several_tokens_are_left_out(save_tiny: Callable[..., Path]) -> None:
    """DeepSeek stores them after the last layer, Qwen under `mtp`; any other surplus layer is a fault."""
    directory = save_tiny("deepseek_v3")
    tensors = read_tensors(directory)
    drafts = {"model.layers.2.eh_proj.weight": torch.zeros(1), "mtp.layers.0.mlp.up_proj.weight": torch.zeros(1)}

    got = build(directory, tensors | drafts, num_nextn_predict_layers=1)

    assert torch.equal(logits(build(directory, tensors)), logits(got))
    with pytest.raises(PlanError, match=r"^model\.layers\.2\.eh_proj\.weight: expected a tensor that"):
        build(directory, tensors | drafts, num_nextn_predict_layers=0)


def test_an_fp8_cache_of_latents_is_refused(save_tiny: Callable[..., Path]) -> None:
    """Multi-head latent attention keeps no keys and values, so there is nothing to round."""
    directory = save_tiny("deepseek_v3")
    tensors, fp8 = read_tensors(directory), QuantConfig(kv_cache_quant_algo="FP8")

    with pytest.raises(PlanError, match=r"kv_cache_quant_algo: expected attention with k_proj and v_proj.*=False"):
        build_model(read_config(directory), fp8, tensors.items(), name="tiny")
    assert torch.equal(logits(build(directory, tensors)), logits(build(directory, tensors, fp8)))
