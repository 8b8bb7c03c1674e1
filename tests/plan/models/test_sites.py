"""Compare the modules that rows list with those of transformers, and config.json with the sizes that rows need."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from builders import tiny_config
from installed_transformers import has_newest_transformers, is_installed, typed_config
from stated_model import stated_model
from tiny_models import FAMILIES

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import ConfigError, Fault
from trtllm_ct.plan.models.class_row import DEFAULT_ROW
from trtllm_ct.plan.models.class_rows import CLASS_ROWS, TEXT_MODELS
from trtllm_ct.plan.models.sites import Model, Site

if TYPE_CHECKING:
    from collections.abc import Iterator

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FAMILIES),
    *((name, {"tied": True}) for name in FAMILIES),
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    ("LlamaForCausalLM", {"num_key_value_heads": 4, "head_dim": 32}),
    ("Qwen3ForCausalLM", {"attention_bias": True}),
    ("Qwen2MoeForCausalLM", {"qkv_bias": False}),
    ("Qwen2MoeForCausalLM", {"decoder_sparse_step": 2}),
    ("Qwen3MoeForCausalLM", {"mlp_only_layers": [1]}),
    ("DeepseekV2ForCausalLM", {"q_lora_rank": None}),
    ("DeepseekV3ForCausalLM", {"q_lora_rank": None, "attention_bias": True}),
]


def config_of(architecture: str, **options: Any) -> dict[str, Any]:
    absent = {key: None for key, value in options.items() if value is None}
    return tiny_config(architecture, **(FAMILIES[architecture] | options)) | absent


def sites(config: dict[str, Any]) -> dict[str, Site]:
    return {site.module: site for site in stated_model(config).sites()}


def faults(**config: Any) -> tuple[Fault, ...]:
    with pytest.raises(ConfigError) as caught:
        Model.from_config(tiny_config(**config))
    return caught.value.faults


def test_every_row_that_lists_modules_is_compared() -> None:
    assert FAMILIES.keys() == {name for name, row in CLASS_ROWS.items() if row.leaves}


@pytest.mark.reference
@pytest.mark.parametrize(
    ("architecture", "options"), [case for case in VARIANTS if is_installed(FAMILIES[case[0]]["model_type"])]
)
def test_sites_are_exactly_the_modules_that_transformers_builds(architecture: str, options: dict[str, Any]) -> None:
    """Names, shapes and other parameters are equal: the rows have no module too few and none too many."""
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(architecture, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(typed_config(**config))

    assert type(model).__name__ == architecture
    found = {name: (site.shape, set(site.locals)) for name, site in sites(config).items()}
    assert found == dict(modules(model, tied=config["tie_word_embeddings"]))


# Kimi K2 has the code of DeepSeek-V3 in its own repository; transformers does not know its name.
TEXT_PARTS = {name: family for name, family in TEXT_MODELS.items() if name != "kimi_k2" and is_installed(name)}


@pytest.mark.reference
@pytest.mark.parametrize("model_type", TEXT_PARTS)
def test_the_text_part_of_a_multimodal_model_has_the_modules_of_its_family(model_type: str) -> None:
    """Under whatever name transformers knows it; the head belongs to the whole model."""
    import torch
    from transformers import AutoModel

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    positions = {"rope_parameters": rope} if "_vl_" in model_type else {}
    text = config_of(TEXT_PARTS[model_type], tied=True, **positions) | {"model_type": model_type}
    with torch.device("meta"):
        model = AutoModel.from_config(typed_config(**text))

    whole = {"architectures": ["SomeForConditionalGeneration"], "text_config": text}
    found = {name: (site.shape, set(site.locals)) for name, site in sites(whole).items()}
    assert found == {f"model.{name}": module for name, module in modules(model, tied=True)}


def modules(model: Any, *, tied: bool) -> Iterator[tuple[str, tuple[tuple[int, ...], set[str]]]]:
    """Name, shape of the weight and further parameters of every module, under the names of files.

    transformers 5 joins routed experts into one tensor for all of them and calls Mixtral's `mlp`; files do neither.
    """
    projections = ("gate_proj", "up_proj", "down_proj")
    mixtral = type(model).__name__.startswith("Mixtral")
    for module_name, module in model.named_modules():
        name = module_name.replace(".mlp.", ".block_sparse_moe.") if mixtral else module_name
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        if "gate_up_proj" in own and own["gate_up_proj"].dim() == 3:
            # transformers 4 has stacked experts for Qwen3-VL only, as [E, in, out].
            stacked = own["gate_up_proj"] if has_newest_transformers() else own["gate_up_proj"].mT
            experts, rows, columns = stacked.shape
            for expert in range(experts):
                for projection in ("w1", "w3", "w2") if mixtral else projections:
                    shape = (columns, rows // 2) if projection in {"w2", "down_proj"} else (rows // 2, columns)
                    yield f"{name}.{expert}.{projection}", (shape, set())
        elif "weight" in own and not (name == "lm_head" and tied):
            others = own.keys() - {"weight", "embed_scale"}
            yield name, (tuple(own["weight"].shape), {local for local in others if own[local] is not None})


QKV = {"self_attn.qkv_proj": ["q_proj", "k_proj", "v_proj"]}
JOINED = {"self_attn.kv_a_proj_with_mqa": ["q_a_proj", "kv_a_proj_with_mqa"]}
GATE_UP = {"mlp.gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.mark.parametrize(
    ("architecture", "fused"),
    [
        *((name, QKV | GATE_UP) for name in ("LlamaForCausalLM", "MistralForCausalLM", "Gemma3ForCausalLM")),
        *((name, QKV | GATE_UP) for name in ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "GraniteForCausalLM")),
        ("Phi3ForCausalLM", {}),
        ("MixtralForCausalLM", QKV | {"block_sparse_moe.experts": ["w1", "w3", "w2"] * 4}),
        ("Qwen3MoeForCausalLM", QKV | {"mlp.experts": ["gate_proj", "up_proj", "down_proj"] * 4}),
        ("DeepseekV3ForCausalLM", GATE_UP | JOINED),
    ],
)
def test_modules_that_must_share_a_mode_are_in_one_group(architecture: str, fused: dict[str, list[str]]) -> None:
    """q/k/v, gate/up and all routed experts of a layer."""
    members: dict[str, list[str]] = {}
    for name, site in sites(config_of(architecture)).items():
        if site.mode_group is not None and name.startswith("model.layers.0."):
            members.setdefault(site.mode_group.removeprefix("model.layers.0."), []).append(name.rpartition(".")[2])

    assert members == fused


def test_only_routed_experts_are_experts_and_are_not_fused() -> None:
    """An engine fuses q/k/v into one Linear; experts have one kernel, which reads them separately."""
    for name, site in sites(config_of("Qwen2MoeForCausalLM")).items():
        assert site.expert is (".experts." in name)
        assert site.fused is (site.mode_group is not None and not site.expert)


def test_routers_and_embeddings_are_read_plain() -> None:
    found = sites(config_of("DeepseekV3ForCausalLM"))

    plain = {name.removeprefix("model.layers.1.") for name, site in found.items() if site.plain and ".0." not in name}
    assert plain == {"model.embed_tokens", "mlp.gate", "self_attn.kv_b_proj"}
    assert [name for name, site in found.items() if site.head] == ["lm_head"]


def test_the_last_part_that_a_class_joins_may_end_within_a_block() -> None:
    found = sites(config_of("DeepseekV3ForCausalLM"))

    joined = {name.rpartition(".")[2]: site.fused for name, site in found.items() if site.class_joins}
    assert joined == {"q_a_proj": True, "kv_a_proj_with_mqa": False}


@pytest.mark.parametrize(("drafts", "plain"), [(0, False), (1, True)])
def test_heads_are_read_plain_beside_draft_layers(drafts: int, plain: bool) -> None:
    assert sites(config_of("DeepseekV3ForCausalLM") | {"num_nextn_predict_layers": drafts})["lm_head"].plain is plain


def test_a_tied_lm_head_is_no_site() -> None:
    assert "lm_head" in sites(tiny_config())
    assert "lm_head" not in sites(tiny_config(tied=True))


@pytest.mark.parametrize("absent", [{"head_dim": None}, {"num_key_value_heads": None}])
def test_head_sizes_that_config_leaves_out_are_derived(absent: dict[str, Any]) -> None:
    """As transformers does it: head_dim from the hidden size, as many KV heads as heads."""
    config = tiny_config(hidden=64, heads=4, kv_heads=4, **absent)

    assert sites(config)["model.layers.0.self_attn.k_proj"].shape == (64, 64)


@pytest.mark.parametrize("names", [["GrokForCausalLM"], [], None, "GrokForCausalLM", ["LlamaModel", "X"]])
def test_an_unknown_architecture_has_the_default_row_and_needs_no_sizes(names: object) -> None:
    model = Model.from_config({"architectures": names})

    assert model.name == (str(names[0]) if isinstance(names, list) and names else str(names or "none"))
    assert model.row is DEFAULT_ROW
    assert not model.has_row
    assert model.tied is None


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "num_hidden_layers",
        "vocab_size",
    ],
)
@pytest.mark.parametrize("value", [0, -1, True, "64", 1.5, [64]])
def test_a_size_that_is_no_positive_integer_is_a_fault(key: str, value: object) -> None:
    (fault,) = faults(**{key: value})

    assert (fault.where, fault.found) in {(f"config.json: {key}", text) for text in (repr(value), json.dumps(value))}
    assert fault.expected.startswith("a positive integer")


@pytest.mark.parametrize(
    ("architecture", "absent", "where"),
    [
        ("MixtralForCausalLM", "num_local_experts", "num_local_experts or n_routed_experts or num_experts"),
        ("Qwen3MoeForCausalLM", "num_experts", "num_local_experts or n_routed_experts or num_experts"),
        ("DeepseekV3ForCausalLM", "kv_lora_rank", "kv_lora_rank"),
        ("DeepseekV3ForCausalLM", "v_head_dim", "v_head_dim"),
    ],
)
def test_sizes_that_only_some_families_need_are_required_for_them(architecture: str, absent: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Model.from_config(config_of(architecture, **{absent: None}))

    (fault,) = caught.value.faults
    assert (fault.where, fault.expected, fault.found) == (f"config.json: {where}", "a positive integer", "None")


@pytest.mark.parametrize(
    "key", ["moe_intermediate_size", "n_shared_experts", "num_nextn_predict_layers", "kv_lora_rank"]
)
@pytest.mark.parametrize("value", [-1, "64", 1.5])
def test_a_size_of_a_family_that_is_no_integer_is_a_fault(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Model.from_config(config_of("DeepseekV3ForCausalLM", **{key: value}))

    (fault,) = caught.value.faults
    assert (fault.where, fault.found) == (f"config.json: {key}", json.dumps(value))


def test_all_missing_sizes_are_reported_together() -> None:
    """Those of a class whose defaults are not known."""
    missing = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")

    found = faults(**dict.fromkeys(missing), dtype="int8", model_type="someone_elses")

    assert {fault.where for fault in found} == {f"config.json: {key}" for key in (*missing, "dtype")}


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ({"dtype": "float16"}, DType.F16),
        ({"dtype": None, "torch_dtype": "float32"}, DType.F32),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, DType.BF16),
        ({"dtype": "torch.float16"}, DType.F16),
        ({"dtype": None}, DType.BF16),
    ],
)
def test_both_spellings_of_the_model_dtype(spelling: dict[str, Any], dtype: DType) -> None:
    """`dtype` takes precedence over `torch_dtype`; without either it is bfloat16."""
    assert Model.from_config(tiny_config(**spelling)).dtype is dtype


@pytest.mark.parametrize("name", ["int8", "float8_e4m3fn", "auto", 16, {"": "bfloat16"}])
def test_a_dtype_that_no_model_computes_in_is_a_fault(name: object) -> None:
    (fault,) = faults(dtype=name)

    assert fault.where == "config.json: dtype"
    assert fault.found in {repr(name), json.dumps(name)}
