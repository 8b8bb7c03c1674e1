"""KV-cache scales: from the attention module, where compressed-tensors stores them, to the projections."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import Built, fp8_weights, rewrite, rewrite_config, tiny_config, write_checkpoint
from on_tensors import stream_delivered
from own_loader_models import write_own_loader
from safetensors.torch import load_file
from stacked_models import STACKED, write_stacked

from trtllm_ct.base.errors import Fault, PayloadError, PlanError
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.pipeline.open import open_checkpoint, plan_checkpoint
from trtllm_ct.plan.plan import Fate
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from trtllm_ct.plan.plan import Plan

ATTENTION = "model.layers.0.self_attn"


@pytest.fixture
def built(tmp_path: Path) -> Built:
    return write_checkpoint(tmp_path, config=tiny_config(layers=2), scheme="fp8-tensor-static", kv=True)


def fates(plan: Plan) -> set[tuple[Fate, str]]:
    """Return the fates and reasons of the tensors of the first attention module."""
    names = {f"{ATTENTION}.{letter}_scale" for letter in "kv"}
    return {(fate.fate, fate.reason) for fate in plan.fates() if fate.name in names}


def faults(directory: Path, to: str = "modelopt") -> tuple[Fault, ...]:
    with pytest.raises(PlanError) as caught:
        plan_checkpoint(directory, to)
    return caught.value.faults


def set_scheme(directory: Path, scheme: dict[str, Any] | None) -> None:
    rewrite_config(directory, lambda config: config["quantization_config"].update(kv_cache_scheme=scheme))


@pytest.mark.parametrize("to", ["modelopt", "reference"])
def test_scales_are_delivered_in_the_projections_as_one_float32_each(built: Built, to: str) -> None:
    plan = plan_checkpoint(built.directory, to)

    scales = {name: str(spec) for name, spec in plan.delivered_specs.items() if name.endswith(("k_scale", "v_scale"))}
    assert scales == {
        f"model.layers.{layer}.self_attn.{letter}_proj.{letter}_scale": "float32 []"
        for layer in range(2)
        for letter in "kv"
    }
    assert plan.quant_config.kv_cache_quant_algo == "FP8"


def test_a_plain_target_ignores_the_kv_cache(built: Built) -> None:
    plan = plan_checkpoint(built.directory, "dense")

    assert plan.quant_config.kv_cache_quant_algo is None
    assert fates(plan) == {(Fate.IGNORED, "target dense leaves the KV cache alone")}


def test_scales_without_a_scheme_are_ignored(built: Built) -> None:
    set_scheme(built.directory, None)

    plan = plan_checkpoint(built.directory)

    assert plan.quant_config.kv_cache_quant_algo is None
    assert plan.module(ATTENTION).deliveries == ()
    assert fates(plan) == {(Fate.IGNORED, "the configuration leaves the KV cache unquantized")}


def test_zero_points_of_a_symmetric_scheme_are_ignored(built: Built) -> None:
    """llm-compressor writes zeros there for some schemes."""
    zero = torch.zeros(1, dtype=torch.int8)
    rewrite(built.directory, lambda stored: stored.update({f"{ATTENTION}.k_zero_point": zero}))

    fate = next(fate for fate in plan_checkpoint(built.directory).fates() if fate.name.endswith("k_zero_point"))

    assert (fate.fate, fate.reason) == (Fate.IGNORED, "the KV cache is symmetric")


@pytest.mark.parametrize("lost", [[f"{ATTENTION}.k_scale"], [f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale"]])
def test_every_missing_scale_is_named(built: Built, lost: list[str]) -> None:
    """Engines leave a scale that they don't find uninitialised."""
    rewrite(built.directory, lambda stored: [stored.pop(name) for name in lost])

    found = faults(built.directory)

    assert [fault.where for fault in found] == lost
    assert {(fault.expected, fault.found) for fault in found} == {
        ("the scale that kv_cache_scheme promises", "no such tensor")
    }


def test_a_scheme_without_any_scales_names_every_layer(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, scheme="fp8-tensor-static")
    set_scheme(tmp_path, fp8_weights("tensor"))

    found = faults(tmp_path)
    assert len(found) == 2 * 2
    assert {fault.found for fault in found} == {"no scale of the KV cache in any layer"}
    assert all(fault.remedy.startswith("Calibrate the KV cache with llm-compressor") for fault in found)
    assert plan_checkpoint(tmp_path, "dense").target == "dense"


@pytest.mark.parametrize("shape", [(2,), (2, 1, 1), (0,)])
def test_a_scale_per_head_is_refused_for_strategy_tensor(built: Built, shape: tuple[int, ...]) -> None:
    rewrite(built.directory, lambda stored: stored.update({f"{ATTENTION}.v_scale": torch.ones(shape)}))

    (fault,) = faults(built.directory)

    assert fault.where == f"{ATTENTION}.v_scale"
    assert (fault.expected, fault.found) == ("one element", f"float32 {list(shape)}")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_one_element_is_accepted_in_any_shape(built: Built, shape: tuple[int, ...]) -> None:
    rewrite(built.directory, lambda stored: stored.update({f"{ATTENTION}.v_scale": torch.ones(shape)}))

    assert str(plan_checkpoint(built.directory).delivered_specs[f"{ATTENTION}.v_proj.v_scale"]) == "float32 []"


def per_head(directory: Path, values: Tensor) -> None:
    """Store these values as the scale per head of every layer's keys and values, and say so in the configuration."""
    set_scheme(directory, fp8_weights("attn_head"))

    def widen(stored: dict[str, Tensor]) -> None:
        stored.update({name: values.clone() for name in stored if name.endswith(("k_scale", "v_scale"))})

    rewrite(directory, widen)


@pytest.mark.parametrize("values", [[0.25, 0.125], [0.0078125, 3.5], [1.0, 1.0]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_of_scales_per_head_the_largest_is_delivered_with_a_warning(
    built: Built, values: list[float], dtype: torch.dtype
) -> None:
    """Engines take one scale for all heads: with a smaller one, the values of a head would overflow."""
    per_head(built.directory, torch.tensor(values, dtype=dtype).reshape(2, 1, 1))
    checkpoint = open_checkpoint(built.directory)
    plan = checkpoint.plan()

    delivered: dict[str, Tensor] = {}
    for _module, tensors in stream_delivered(plan, checkpoint.catalog):
        delivered |= tensors

    for letter in "kv":
        scale = delivered[f"{ATTENTION}.{letter}_proj.{letter}_scale"]
        assert (scale.dtype, scale.shape, float(scale)) == (torch.float32, (), max(values))
    assert plan.quant_config.kv_cache_quant_algo == "FP8"
    assert fates(plan) == {(Fate.CONSUMED, "")}
    assert [text for text in plan.warnings if "per head" in text or "attn_head" in text] == [
        "KV cache: the engine takes one scale for all heads, so it gets the largest of fp8 attn_head"
    ]


@pytest.mark.parametrize("to", ["modelopt", "dense"])
def test_a_conversion_of_scales_per_head_agrees_with_its_source(
    built: Built, tmp_path_factory: pytest.TempPathFactory, to: str
) -> None:
    per_head(built.directory, torch.tensor([0.5, 0.75], dtype=torch.bfloat16))
    out = tmp_path_factory.mktemp("converted") / "out"

    convert_checkpoint(built.directory, out, to=to)

    assert verify_checkpoint(built.directory, out).faults == ()


def test_a_missing_scale_per_head_is_named(built: Built) -> None:
    per_head(built.directory, torch.ones(2))
    rewrite(built.directory, lambda stored: [stored.pop(f"{ATTENTION}.v_scale")])

    assert [fault.where for fault in faults(built.directory)] == [f"{ATTENTION}.v_scale"]


@pytest.mark.parametrize("count", [3, 4])
def test_a_wrong_number_of_scales_per_head_is_refused(built: Built, count: int) -> None:
    """The model has 4 heads of queries and 2 of keys."""
    per_head(built.directory, torch.ones(count))

    assert {fault.expected for fault in faults(built.directory)} == {
        "one element, or one for each of the 2 K/V heads of the layer"
    }


def layers_with_other_heads(directory: Path, name: str) -> dict[str, int]:
    """Write a model whose layers differ in their K/V heads, and return the number of each attention."""
    if name in STACKED:
        write_stacked(directory, name, "fp8-channel-token", enable_moe_block=False)
    else:
        # Its class reads attention plain, and experts in this mode.
        built = write_own_loader(directory, name, "nvfp4")
        other = built.config["attention_other_setting"] | {"num_attention_groups": 2}
        rewrite_config(directory, lambda config: config.update(attention_other_setting=other))
        rewrite(directory, lambda stored: stored.update(_half_of_the_heads(stored, built.config["layer_types"])))
    stored = load_file(directory / "model.safetensors")
    rows = {key.rpartition(".k_proj.")[0]: len(value) for key, value in stored.items() if ".k_proj.weight_scale" in key}
    return {attention: count // stored[f"{attention}.k_norm.weight"].numel() for attention, count in rows.items()}


def _half_of_the_heads(stored: Mapping[str, Tensor], kinds: Sequence[str]) -> dict[str, Tensor]:
    """Return the keys and values of the sliding layers, with the first half of their rows."""
    layers = tuple(f"model.layers.{at}." for at, kind in enumerate(kinds) if kind == "sliding_attention")
    ends = tuple(f"{letter}_proj.{local}" for letter in "kv" for local in ("weight_packed", "weight_scale"))
    halved = [key for key in stored if key.startswith(layers) and key.endswith(ends)]
    return {key: stored[key][: len(stored[key]) // 2].clone() for key in halved}


def store_per_head(directory: Path, heads: Mapping[str, int]) -> None:
    """Store as many scales for each attention, the largest of them 0.5, and say so in the configuration."""
    scales = {
        f"{name}.{letter}_scale": torch.linspace(0.25, 0.5, count) for name, count in heads.items() for letter in "kv"
    }
    set_scheme(directory, fp8_weights("attn_head"))
    rewrite(directory, lambda stored: stored.update(scales))


@pytest.mark.parametrize("name", ["Gemma4ForCausalLM", "Step3p5ForCausalLM"])
def test_layers_may_have_different_numbers_of_heads(tmp_path: Path, name: str) -> None:
    heads = layers_with_other_heads(tmp_path / "in", name)
    assert len({*heads.values()}) > 1
    store_per_head(tmp_path / "in", heads)

    checkpoint = open_checkpoint(tmp_path / "in")
    delivered: dict[str, Tensor] = {}
    for _module, tensors in stream_delivered(checkpoint.plan(engine="stock-1.3"), checkpoint.catalog):
        delivered |= tensors
    assert {name: float(scale) for name, scale in delivered.items() if name.endswith(("k_scale", "v_scale"))} == {
        f"{attention}.{letter}_proj.{letter}_scale": 0.5 for attention in heads for letter in "kv"
    }


@pytest.mark.reference
def test_a_conversion_of_layers_with_different_heads_agrees_with_its_source(tmp_path: Path) -> None:
    store_per_head(tmp_path / "in", layers_with_other_heads(tmp_path / "in", "Gemma4ForCausalLM"))

    convert_checkpoint(tmp_path / "in", tmp_path / "out", engine="stock-1.3")

    assert verify_checkpoint(tmp_path / "in", tmp_path / "out").faults == ()


@pytest.mark.parametrize("name", ["Gemma4ForCausalLM", "Step3p5ForCausalLM"])
def test_a_layer_takes_only_as_many_scales_as_it_has_heads(tmp_path: Path, name: str) -> None:
    heads = layers_with_other_heads(tmp_path, name)
    first, other = next((a, b) for a in heads for b in heads if heads[a] != heads[b])
    store_per_head(tmp_path, heads | {first: heads[other]})

    with pytest.raises(PlanError) as caught:
        plan_checkpoint(tmp_path, "modelopt", engine="stock-1.3")

    assert {fault.where for fault in caught.value.faults} == {f"{first}.k_scale", f"{first}.v_scale"}
    assert {fault.expected for fault in caught.value.faults} == {
        f"one element, or one for each of the {heads[first]} K/V heads of the layer"
    }


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_bad_scale_of_one_head_is_found(built: Built, value: float) -> None:
    per_head(built.directory, torch.tensor([0.5, value]))
    checkpoint = open_checkpoint(built.directory)

    with pytest.raises(PayloadError) as caught:
        list(stream_delivered(checkpoint.plan(), checkpoint.catalog))

    assert caught.value.faults[0].where == f"{ATTENTION}.k_scale[1]"


def test_a_dynamic_scheme_needs_no_scales(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, scheme="fp8-tensor-static")
    set_scheme(tmp_path, fp8_weights("tensor", dynamic=True))

    assert plan_checkpoint(tmp_path).quant_config.kv_cache_quant_algo == "FP8"


def test_a_cache_that_the_engine_does_not_have_stays_16_bit_with_a_warning(built: Built) -> None:
    set_scheme(built.directory, fp8_weights("tensor", type="int"))

    plan = plan_checkpoint(built.directory)

    assert plan.quant_config.kv_cache_quant_algo is None
    assert fates(plan) == {(Fate.IGNORED, "target modelopt leaves the KV cache alone")}
    assert any("has no int8 tensor cache; it stays 16-bit" in warning for warning in plan.warnings)


def move(names: dict[str, str]) -> Callable[[dict[str, Tensor]], None]:
    """Store the KV scales under other names below the attention module."""

    def rename(stored: dict[str, Tensor]) -> None:
        for name in [name for name in stored if name.endswith(("self_attn.k_scale", "self_attn.v_scale"))]:
            attention, _, local = name.rpartition(".")
            stored[f"{attention}.{names[local]}"] = stored.pop(name)

    return rename


@pytest.mark.parametrize(
    "names",
    [
        {"k_scale": "k_proj.output_scale", "v_scale": "v_proj.output_scale"},
        {"k_scale": "k_proj.k_scale", "v_scale": "v_proj.v_scale"},
        {"k_scale": "k_cache.scale", "v_scale": "v_cache.scale"},
        {"k_scale": "qkv_proj.k_scale", "v_scale": "qkv_proj.v_scale"},
        {"k_scale": "qkqkv_proj.k_scale", "v_scale": "qkqkv_proj.v_scale"},
    ],
    ids=["compressed-tensors up to 0.5", "ModelOpt", "HunYuan", "fused", "Qwen3-MoE"],
)
def test_the_names_of_every_generation_are_read(built: Built, names: dict[str, str]) -> None:
    before = plan_checkpoint(built.directory).delivered_specs
    rewrite(built.directory, move(names))

    plan = plan_checkpoint(built.directory)

    assert plan.delivered_specs.keys() == before.keys()
    made = {each.name: each.sources for each in plan.deliveries() if each.name.endswith(("k_scale", "v_scale"))}
    assert made[f"{ATTENTION}.k_proj.k_scale"] == (f"{ATTENTION}.{names['k_scale']}",)
    assert made[f"{ATTENTION}.v_proj.v_scale"] == (f"{ATTENTION}.{names['v_scale']}",)


def test_one_scale_for_keys_and_values(built: Built) -> None:
    def join(stored: dict[str, Tensor]) -> None:
        for name in [name for name in stored if name.endswith("self_attn.k_scale")]:
            stored[name.replace("k_scale", "kv_scale")] = stored.pop(name)
            del stored[name.replace("k_scale", "v_scale")]

    rewrite(built.directory, join)

    made = {each.name: each.sources for each in plan_checkpoint(built.directory).deliveries()}

    for letter in "kv":
        assert made[f"{ATTENTION}.{letter}_proj.{letter}_scale"] == (f"{ATTENTION}.kv_scale",)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (f"{ATTENTION}.k_proj.output_scale", "another tensor holds this scale of the KV cache"),
        (f"{ATTENTION}.k_proj.k_scale", "another tensor holds this scale of the KV cache"),
        (f"{ATTENTION}.kv_scale", "another tensor holds this scale of the KV cache"),
    ],
)
def test_of_several_scales_one_is_delivered(built: Built, second: str, reason: str) -> None:
    """Quantized outputs put a scale on the projections, beside that of the cache."""
    rewrite(built.directory, lambda stored: stored.update({second: torch.full((1,), 7.0)}))

    plan = plan_checkpoint(built.directory)

    made = [each.sources for each in plan.deliveries() if each.name == f"{ATTENTION}.k_proj.k_scale"]
    if second.endswith("k_proj.k_scale"):
        assert len(made) == 1
    else:
        assert made == [(f"{ATTENTION}.k_scale",)]
        (fate,) = [fate for fate in plan.fates() if fate.name == second]
        assert (fate.fate, fate.reason) == (Fate.IGNORED, reason)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("local", ["k_scale", "k_proj.output_scale", "k_proj.k_scale", "k_cache.scale", "kv_scale"])
def test_a_bad_number_is_found_under_every_name(built: Built, local: str, value: float) -> None:
    """Engines would multiply all keys by it."""

    def rename(stored: dict[str, Tensor]) -> None:
        stored[f"{ATTENTION}.{local}"] = stored.pop(f"{ATTENTION}.k_scale").fill_(value)

    rewrite(built.directory, rename)
    checkpoint = open_checkpoint(built.directory)

    with pytest.raises(PayloadError) as caught:
        list(stream_delivered(checkpoint.plan(), checkpoint.catalog))

    assert caught.value.faults[0].where == f"{ATTENTION}.{local}[0]"
    assert caught.value.faults[0].expected == "a finite scale that is positive"


@pytest.mark.parametrize("place", ["self_attn", "self_attn.qkv_proj"])
@pytest.mark.parametrize("to", ["modelopt", "reference", "tensorrt_llm", "dense"])
@pytest.mark.parametrize("architecture", ["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Phi3ForCausalLM"])
def test_attention_without_k_proj_and_v_proj_gets_no_scales(
    tmp_path: Path, architecture: str, to: str, place: str
) -> None:
    """No module of the engine would read them. A plan says so, and a missing scale is no fault there."""

    def move_and_drop(stored: dict[str, Tensor]) -> None:
        move({f"{letter}_scale": f"{place}.{letter}_scale".removeprefix("self_attn.") for letter in "kv"})(stored)
        del stored[f"model.layers.1.{place}.v_scale"]
        stored[f"model.layers.0.{place}.q_scale"] = torch.ones(1)

    config = tiny_config(architecture, hidden=128)
    write_checkpoint(tmp_path, config=config, scheme="fp8-tensor-static", kv=True, edit=move_and_drop)

    plan = plan_checkpoint(tmp_path, to)

    assert not [name for name in plan.delivered_specs if name.endswith(("k_scale", "v_scale"))]
    said = [warning for warning in plan.warnings if "reads no scales for this attention" in warning]
    assert len(said) == (to != "dense")
    reasons = {fate.reason for fate in plan.fates() if fate.name.endswith(("k_scale", "v_scale"))}
    assert len(reasons) == 1
    assert all(reasons)


@pytest.mark.reference
def test_the_reference_engine_runs_latent_attention_whose_cache_is_quantized(tmp_path: Path) -> None:
    from trtllm_ct.reference import load_model

    config = tiny_config("DeepseekV3ForCausalLM", hidden=128)
    write_checkpoint(tmp_path, config=config, scheme="fp8-tensor-static", kv=True)

    model = load_model(tmp_path, dtype=torch.float32, quantize_activations=False)
    logits = model(torch.tensor([[1, 2, 3]])).logits

    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("value", [math.nan, 1.0])
@pytest.mark.parametrize("name", [f"{ATTENTION}.attn.k_scale", "model.layers.0.some.v_scale", f"{ATTENTION}.q_scale"])
def test_a_plain_target_never_refuses_a_scale_of_the_cache(built: Built, name: str, value: float) -> None:
    """Under names too that no engine reads, of any shape."""
    rewrite(built.directory, lambda stored: stored.update({name: torch.full((3, 1), value)}))

    plan = plan_checkpoint(built.directory, "dense")

    (fate,) = [fate for fate in plan.fates() if fate.name == name]
    assert fate.fate is Fate.IGNORED
    assert fate.reason


ATTENTION_GROUP = {
    "targets": ["LlamaAttention"],
    "weights": None,
    "input_activations": fp8_weights("tensor"),
    "output_activations": None,
}


def test_a_group_that_targets_only_attention_is_the_scheme_of_the_cache(built: Built) -> None:
    """Its scales of queries are ignored, and it leaves no weight without a group."""
    want = plan_checkpoint(built.directory)

    def regroup(config: dict[str, Any]) -> None:
        block = config["quantization_config"]
        block["kv_cache_scheme"] = None
        block["config_groups"]["attention"] = ATTENTION_GROUP

    rewrite_config(built.directory, regroup)
    rewrite(built.directory, lambda stored: stored.update({f"{ATTENTION}.q_scale": torch.ones(1)}))

    plan = plan_checkpoint(built.directory)

    assert plan.delivered_specs == want.delivered_specs
    assert plan.quant_config == want.quant_config
    (query,) = [fate for fate in plan.fates() if fate.name.endswith("q_scale")]
    assert (query.fate, query.reason) == (Fate.IGNORED, "engines don't quantize queries")


def test_a_missing_scale_of_a_group_names_the_group(built: Built) -> None:
    """There is no `kv_cache_scheme` to remove then."""

    def regroup(config: dict[str, Any]) -> None:
        config["quantization_config"]["kv_cache_scheme"] = None
        config["quantization_config"]["config_groups"]["attention"] = ATTENTION_GROUP

    rewrite_config(built.directory, regroup)
    rewrite(built.directory, lambda stored: stored.pop(f"{ATTENTION}.k_scale"))

    (fault,) = faults(built.directory)

    assert fault.expected == "the scale that attention of config_groups promises"
    assert "remove attention of config_groups" in fault.remedy
    assert "kv_cache_scheme" not in fault.remedy


def test_a_quantized_cache_beside_plain_modules_has_one_explanation(tmp_path: Path) -> None:
    """Neither that the target has no such cache nor that the stored scales are used."""
    write_checkpoint(tmp_path, scheme="int8-g32", kv=True)

    plan = plan_checkpoint(tmp_path)

    (warning,) = [text for text in plan.warnings if text.startswith("KV cache")]
    (reason,) = {reason for _, reason in fates(plan)}
    assert reason in warning
    assert "without the stored scales" in warning
    assert plan.quant_config.kv_cache_quant_algo is None


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_what_is_said_of_an_asymmetric_cache_fits_together(built: Built, strategy: str) -> None:
    set_scheme(built.directory, fp8_weights(strategy, symmetric=False))
    if strategy == "attn_head":
        names = [name for name in built.stored if name.endswith(("k_scale", "v_scale"))]
        rewrite(built.directory, lambda stored: stored.update({name: torch.ones(2, 1, 1) for name in names}))

    said = [text for text in plan_checkpoint(built.directory).warnings if text.startswith("KV cache")]

    assert "stored zero points are left out" in said[0]
    assert len(said) == (2 if strategy == "attn_head" else 1)


@pytest.mark.parametrize("local", ["k_zero_point", "v_zero_point"])
def test_zero_points_of_an_asymmetric_scheme_are_left_out_with_a_warning(built: Built, local: str) -> None:
    set_scheme(built.directory, fp8_weights("tensor", symmetric=False))
    rewrite(built.directory, lambda stored: stored.update({f"{ATTENTION}.{local}": torch.ones(1)}))

    plan = plan_checkpoint(built.directory)

    assert any("symmetric" in warning and "zero points" in warning for warning in plan.warnings)
    assert plan.quant_config.kv_cache_quant_algo == "FP8"


@pytest.mark.parametrize("to", ["modelopt", "reference", "dense"])
@pytest.mark.parametrize("names", [{"k_scale": "k_proj.output_scale", "v_scale": "v_proj.output_scale"}, None])
def test_every_scale_has_one_fate(built: Built, names: dict[str, str] | None, to: str) -> None:
    if names:
        rewrite(built.directory, move(names))
    plan = plan_checkpoint(built.directory, to)

    fates = [fate for fate in plan.fates() if fate.name.endswith(("output_scale", "k_scale", "v_scale"))]

    assert len(fates) == len({fate.name for fate in fates}) == 4
    assert all(bool(fate.by) == (not fate.reason) == (to != "dense") for fate in fates)


# Attentions that don't exist, or have no projections whose names a scale could have.


def scales_of(*attentions: str) -> dict[str, Tensor]:
    """Scales of the cache under these attentions, of two elements: they would be refused where they are delivered."""
    return {f"{attention}.{letter}_scale": torch.full((2,), 0.5) for attention in attentions for letter in "kv"}


def delivered_scales(plan: Plan) -> set[str]:
    """The attentions that get scales of the cache."""
    names = [name for name in plan.delivered_specs if name.endswith(("k_scale", "v_scale"))]
    return {name.rpartition(".")[0].rpartition(".")[0] for name in names}


def assert_ignored(directory: Path, attentions: tuple[str, ...], to: str) -> None:
    plan = plan_checkpoint(directory, to)
    assert not delivered_scales(plan) & set(attentions)
    names = scales_of(*attentions)
    lost = [fate for fate in plan.fates() if fate.name in names]
    assert len(lost) == len(names)
    assert all(fate.fate is Fate.IGNORED and fate.reason for fate in lost)


@pytest.mark.parametrize("to", ["modelopt", "tensorrt_llm", "reference", "dense"])
@pytest.mark.parametrize("name", ["model.layers.9.self_attn", "model.layers.0.mlp.self_attn", "self_attn", "x.mixer"])
def test_scales_of_an_attention_that_the_model_lacks_are_ignored(built: Built, name: str, to: str) -> None:
    rewrite(built.directory, lambda stored: stored.update(scales_of(name)))

    assert_ignored(built.directory, (name,), to)


@pytest.fixture
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("converted") / "out"


@pytest.mark.parametrize("name", ["model.layers.2.self_attn", "model.layers.11.self_attn"])
def test_a_conversion_with_scales_of_missing_attentions_verifies(built: Built, beside: Path, name: str) -> None:
    rewrite(built.directory, lambda stored: stored.update(scales_of(name)))

    convert_checkpoint(built.directory, beside)

    assert verify_checkpoint(built.directory, beside).faults == ()


@pytest.mark.parametrize("with_projections", [True, False])
@pytest.mark.parametrize("architecture", ["Mistral3ForConditionalGeneration", "Exaone4_5_ForConditionalGeneration"])
def test_the_attention_of_a_vision_tower_has_no_cache(
    tmp_path: Path, architecture: str, with_projections: bool
) -> None:
    """Neither are scales delivered there, nor is one missed there."""
    from decoder_models import write_decoder

    write_decoder(tmp_path / "in", architecture, "fp8-channel-token")
    set_scheme(tmp_path / "in", fp8_weights("tensor"))
    tower = "model.vision_tower.layers.0.self_attn"
    texts = tuple(f"model.language_model.layers.{layer}.self_attn" for layer in range(2))
    projections = {f"{tower}.{letter}_proj.weight": torch.ones(8, 8).bfloat16() for letter in "qkv"}
    rewrite(
        tmp_path / "in",
        lambda stored: stored.update(
            {name: torch.tensor([0.5]) for name in scales_of(*texts)}
            | scales_of(tower)
            | (projections if with_projections else {})
        ),
    )

    assert_ignored(tmp_path / "in", (tower,), "modelopt")
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert len(delivered_scales(plan_checkpoint(tmp_path / "in"))) == len(texts)
    assert verify_checkpoint(tmp_path / "in", tmp_path / "out").faults == ()


@pytest.mark.reference
def test_layers_without_attention_get_no_scales(tmp_path: Path) -> None:
    """Nemotron-H calls every part of a layer `mixer`; only the second one here is attention."""
    from decoder_models import write_decoder

    write_decoder(tmp_path / "in", "NemotronHForCausalLM", "fp8-channel-token")
    set_scheme(tmp_path / "in", fp8_weights("tensor"))
    attention, *others = (f"backbone.layers.{layer}.mixer" for layer in (1, 0, 2, 3))
    one = {name: torch.tensor([0.5]) for name in scales_of(attention)}
    rewrite(tmp_path / "in", lambda stored: stored.update(one | scales_of(*others)))

    assert_ignored(tmp_path / "in", tuple(others), "modelopt")
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert delivered_scales(plan_checkpoint(tmp_path / "in")) == {attention}
    assert verify_checkpoint(tmp_path / "in", tmp_path / "out").faults == ()


@pytest.mark.reference
@pytest.mark.parametrize("leaf", ["", ".{}_proj"])
@pytest.mark.parametrize("with_projections", [True, False])
@pytest.mark.parametrize("draft", ["mtp.layers.0.self_attn", "model.layers.2.self_attn"])
def test_draft_layers_keep_the_scales_that_their_projections_have(
    tmp_path: Path, draft: str, with_projections: bool, leaf: str
) -> None:
    """Stored in the attention, or in the projections."""
    from decoder_models import write_decoder

    write_decoder(tmp_path / "in", "Glm4MoeForCausalLM", "fp8-channel-token")
    set_scheme(tmp_path / "in", fp8_weights("tensor"))
    texts = tuple(f"model.layers.{layer}.self_attn" for layer in range(2))
    projections = {f"{draft}.{letter}_proj.weight": torch.ones(8, 8).bfloat16() for letter in "qkv"}
    rewrite(
        tmp_path / "in",
        lambda stored: stored.update(
            {name: torch.tensor([0.5]) for name in scales_of(*texts)}
            | {f"{draft}{leaf.format(letter)}.{letter}_scale": torch.tensor([0.5]) for letter in "kv"}
            | (projections if with_projections else {})
        ),
    )

    convert_checkpoint(tmp_path / "in", tmp_path / "out")

    assert delivered_scales(plan_checkpoint(tmp_path / "in")) == {*texts, *((draft,) if with_projections else ())}
    assert verify_checkpoint(tmp_path / "in", tmp_path / "out").faults == ()


@pytest.mark.parametrize("to", ["modelopt", "reference"])
def test_single_scales_of_another_strategy_are_delivered_and_said(tmp_path: Path, to: str) -> None:
    config = tiny_config(layers=1, hidden=128, intermediate=128)
    write_checkpoint(tmp_path, config=config, scheme="int4-g64", kv=True)
    scheme = {"strategy": "group", "group_size": 32}
    rewrite_config(tmp_path, lambda stored: stored["quantization_config"]["kv_cache_scheme"].update(scheme))

    plan = plan_checkpoint(tmp_path, to)

    assert len([name for name in plan.delivered_specs if name.endswith(("k_scale", "v_scale"))]) == 2
    assert "KV cache: the engine takes one fixed scale, the stored one, instead of fp8 group 32" in plan.warnings
