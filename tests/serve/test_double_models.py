"""Whole models of the double: attention's output, wrapped experts, mappers and model classes of each generation."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch
from builders import tiny_config
from engine_modules import experts, linear

from trtllm_ct.engine.releases import RELEASES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OLD, MID, NEWEST = engine_double.GENERATIONS
ATTENTION, EXPERTS = "model.layers.0.self_attn", "model.layers.0.mlp.experts"
LLAMA = tiny_config("LlamaForCausalLM", hidden=128, layers=1)
QWEN3_MOE = tiny_config("Qwen3MoeForCausalLM", hidden=128, layers=1, moe_intermediate_size=128)


def decoder(config: dict[str, Any], algo: str | None, layers: dict[str, str] | None = None, **more: Any) -> Any:
    """Return a model without weights; `layers` are the algorithms of modules by name."""
    from tensorrt_llm._torch.model_config import ModelConfig, PretrainedConfig
    from tensorrt_llm._torch.models.modeling_decoder import Decoder
    from tensorrt_llm.models.modeling_utils import QuantConfig

    cache = more.pop("cache", None)
    entries = {
        name: QuantConfig(quant_algo=each, kv_cache_quant_algo=cache, group_size=64)
        for name, each in (layers or {}).items()
    }
    whole = QuantConfig(
        quant_algo="MIXED_PRECISION" if layers else algo,
        kv_cache_quant_algo=cache,
        group_size=64,
        exclude_modules=more.pop("exclude", None),
    )
    pretrained = PretrainedConfig(**config, _name_or_path="no directory")
    return Decoder(
        ModelConfig(pretrained_config=pretrained, quant_config=whole, quant_config_dict=entries or None, **more)
    )


# Releases.


def test_every_release_of_the_project_has_its_generation() -> None:
    assert list(engine_double.GENERATION_OF) == [release.name for release in RELEASES]
    with engine_double.installed(MID):
        from tensorrt_llm import _double

        assert _double.GENERATIONS == engine_double.GENERATIONS
        assert _double.RELEASE.name == MID


# Attention's output.

WRITES_FP8 = ["FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES", "FP8"]
WRITES_FP4 = ["NVFP4", "W4A8_NVFP4_FP8"]
KEEPS_BFLOAT16 = ["W8A16", "W4A16", "W4A16_AWQ", None]


def quantizes_output(algo: str | None, cache: str | None, **more: Any) -> bool:
    result: bool = decoder(LLAMA, algo, cache=cache, **more).get_submodule(ATTENTION).quantizes_output
    return result


@pytest.mark.parametrize("algo", [*WRITES_FP8, *WRITES_FP4])
@pytest.mark.parametrize("cache", ["FP8", "NVFP4"])
def test_attention_quantizes_its_output_for_every_o_proj_with_scales(engine: Any, algo: str, cache: str) -> None:
    assert quantizes_output(algo, cache)


@pytest.mark.parametrize("algo", [*WRITES_FP8, *WRITES_FP4])
def test_nothing_happens_without_a_quantized_cache(engine: Any, algo: str) -> None:
    assert not quantizes_output(algo, None)


@pytest.mark.parametrize("algo", KEEPS_BFLOAT16)
def test_nothing_happens_without_scales_of_o_proj(engine: Any, algo: str | None) -> None:
    assert not quantizes_output(algo, "FP8")
    assert not quantizes_output("FP8_PER_CHANNEL_PER_TOKEN", "FP8", exclude=[f"{ATTENTION}.o_proj"])


def test_attention_has_the_configuration_of_q_proj(engine: Any) -> None:
    both = {f"{ATTENTION}.{leaf}": "FP8_PER_CHANNEL_PER_TOKEN" for leaf in ("q_proj", "o_proj")}
    assert quantizes_output(None, "FP8", layers=both)
    assert not quantizes_output(None, "FP8", layers=both | {f"{ATTENTION}.q_proj": "W4A16_AWQ"})


def test_dynamic_per_tensor_o_proj_gets_bfloat16(engine: Any) -> None:
    """`out_scale` is its `inv_input_scale`, which it has not."""
    attention = decoder(LLAMA, "FP8", cache="FP8").get_submodule(ATTENTION)
    codes = torch.ones(128, 128).to(torch.float8_e4m3fn)
    attention.o_proj.load_weights([{"weight": codes, "weight_scale": torch.ones(())}])
    assert not attention.quantizes_output


@pytest.mark.parametrize(("generation", "honoured"), [(MID, False), (NEWEST, True)])
@pytest.mark.parametrize("algo", ["FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES"])
def test_attention_honours_forced_dynamic_quantization_in_newer_releases(
    generation: str, honoured: bool, algo: str
) -> None:
    with engine_double.installed(generation):
        assert quantizes_output(algo, "FP8", force_dynamic_quantization=True) is not honoured


@pytest.mark.parametrize(("generation", "read"), [(OLD, False), (MID, False), (NEWEST, True)])
def test_whether_attention_honours_it_is_seen_in_its_code(generation: str, read: bool) -> None:
    """A probe of the installed engine can look there, and not at the arguments of `LLM`."""
    with engine_double.installed(generation):
        from tensorrt_llm._torch.modules.attention import Attention

        assert ("force_dynamic_quantization" in Attention._use_quantize_output.__code__.co_names) is read


@pytest.mark.parametrize(("generation", "there"), [(OLD, False), (MID, True), (NEWEST, True)])
def test_the_argument_is_there_since_2026(generation: str, there: bool) -> None:
    with engine_double.installed(generation):
        from tensorrt_llm.llmapi import TorchLlmArgs

        assert ("force_dynamic_quantization" in TorchLlmArgs.model_fields) is there


@pytest.mark.parametrize(
    ("algo", "input_scale", "factor"),
    [
        ("FP8_PER_CHANNEL_PER_TOKEN", None, 1),
        ("FP8_PER_CHANNEL_PER_TOKEN", 4.0, 1 / 4),
        ("FP8_BLOCK_SCALES", None, 1),
        ("FP8_BLOCK_SCALES", 4.0, 1),
        ("FP8", 4.0, 1),
    ],
)
def test_only_a_row_wise_o_proj_forgets_the_scale_of_its_input(
    engine: Any, algo: str, input_scale: float | None, factor: float
) -> None:
    attention = decoder(LLAMA, algo, cache="FP8").get_submodule(ATTENTION)
    shape = {"FP8": (), "FP8_PER_CHANNEL_PER_TOKEN": (128,), "FP8_BLOCK_SCALES": (1, 1)}[algo]
    weights = {"weight": torch.eye(128).to(torch.float8_e4m3fn), "weight_scale": torch.ones(shape)}
    more = {} if input_scale is None else {"input_scale": torch.tensor(input_scale)}
    attention.o_proj.load_weights([weights | more])
    values = torch.arange(128.0)[None]
    assert torch.equal(attention.o_proj(attention._quantize_output(values)), values * factor)


def test_a_fixed_scale_rounds_small_values_to_zero_and_clamps_large_ones() -> None:
    with engine_double.installed(MID, quantize_activations=True):
        attention = decoder(LLAMA, "FP8_BLOCK_SCALES", cache="FP8").get_submodule(ATTENTION)
        weights = {"weight": torch.eye(128).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1, 1)}
        attention.o_proj.load_weights([weights])
        values = torch.zeros(1, 128)
        values[0, :4] = torch.tensor([2.0**-11, 2.0**-9, 1.0, 1000.0])
        output = attention.o_proj(attention._quantize_output(values))
    assert output[0, :4].tolist() == [0, 2.0**-9, 1, 448]


@pytest.mark.parametrize(("generation", "follows"), [(OLD, False), (MID, False), (NEWEST, True)])
def test_entries_of_layers_follow_the_users_cache_in_newer_releases(
    generation: str, follows: bool, tmp_path: Path
) -> None:
    """`validate_and_set_kv_cache_quant` set the global configuration only, and attention writes by its entry."""
    layers = {f"{ATTENTION}.q_proj": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}}
    whole = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": layers}
    for name in ("hf_quant_config.json", "quant_cfg.json"):
        document = {"quantization": whole} if name.startswith("hf") else whole
        (tmp_path / name).write_text(json.dumps(document))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with engine_double.installed(generation):
        from tensorrt_llm._torch.models.checkpoints import HfCheckpointLoader
        from tensorrt_llm._torch.models.modeling_decoder import Decoder
        from tensorrt_llm._torch.pyexecutor.model_loader import ModelLoader
        from tensorrt_llm.llmapi import KvCacheConfig, TorchLlmArgs
        from tensorrt_llm.mapping import Mapping

        args = TorchLlmArgs.from_kwargs(model=str(tmp_path), kv_cache_config=KvCacheConfig(dtype="fp8"))
        config = ModelLoader(args, Mapping())._load_config(str(tmp_path), HfCheckpointLoader())
        attention = Decoder(config).get_submodule(ATTENTION)
        assert attention.quant_config.kv_cache_quant_algo == ("FP8" if follows else None)
        if not follows:
            with pytest.raises(RuntimeError, match="illegal memory access"):
                attention(torch.ones(1, 128))


# Wrapped experts.


def modes(**arguments: Any) -> tuple[str | None, str | None]:
    """Return the algorithms of the module of all experts, and of the module that has their parameters."""
    module = decoder(QWEN3_MOE, arguments.pop("algo", None), **arguments).get_submodule(EXPERTS)
    kernel = getattr(module, "backend", module)
    assert dict(kernel.named_parameters(recurse=False))
    assert kernel is module or not dict(module.named_parameters(recurse=False))
    return module.quant_config.quant_algo, kernel.quant_config.quant_algo


@contextmanager
def installed(generation: str) -> Iterator[None]:
    with engine_double.installed(generation):
        yield


@pytest.mark.parametrize(("generation", "kernel"), [(OLD, None), (MID, "FP8_BLOCK_SCALES"), (NEWEST, None)])
def test_the_wrapped_kernel_ignores_exclusions_of_the_wrapper(generation: str, kernel: str | None) -> None:
    with installed(generation):
        assert modes(algo="FP8_BLOCK_SCALES", exclude=[EXPERTS]) == (None, kernel)


@pytest.mark.parametrize(
    ("generation", "kernel"), [(OLD, "FP8_BLOCK_SCALES"), (MID, "MIXED_PRECISION"), (NEWEST, "FP8_BLOCK_SCALES")]
)
def test_the_wrapped_kernel_ignores_entries_of_the_wrapper(generation: str, kernel: str) -> None:
    with installed(generation):
        entry = {f"{EXPERTS}.0.gate_proj": "FP8_BLOCK_SCALES"}
        assert modes(layers=entry) == ("FP8_BLOCK_SCALES", kernel)


def test_entries_for_the_backend_reach_it(engine: Any) -> None:
    """Names that the other generations do not have change nothing there."""
    assert modes(algo="FP8_BLOCK_SCALES", exclude=[EXPERTS, f"{EXPERTS}.backend"]) == (None, None)
    layers = {EXPERTS: "FP8_BLOCK_SCALES", f"{EXPERTS}.backend": "FP8_BLOCK_SCALES"}
    assert modes(layers=layers) == ("FP8_BLOCK_SCALES", "FP8_BLOCK_SCALES")


def test_only_exact_names_and_patterns_reach_the_backend(mid: Any) -> None:
    for entry, reached in {f"{EXPERTS}*": True, f"{EXPERTS}.backend": True, EXPERTS: False, "re:.*": False}.items():
        assert (modes(algo="FP8_BLOCK_SCALES", exclude=[entry])[1] is None) is reached


def test_the_wrapper_can_be_switched_off_until_july_2026(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENABLE_CONFIGURABLE_MOE", "0")
    for generation, wrapped in ((OLD, False), (MID, False), (NEWEST, True)):
        with installed(generation):
            assert hasattr(decoder(QWEN3_MOE, None).get_submodule(EXPERTS), "backend") is wrapped


def test_weights_of_experts_have_no_backend_in_their_names(engine: Any) -> None:
    """`_load_weights_impl_v2` gives the child the name of the wrapper."""
    from tensorrt_llm._torch.models.checkpoints.auto_mapper import AutoCheckpointMapper

    model = decoder(QWEN3_MOE, None)
    mapper = AutoCheckpointMapper.get("HF", "Qwen3MoeForCausalLM")
    mapper.init_model_and_config(model, model.model_config)
    weights = {
        f"{EXPERTS}.{expert}.{part}.weight": torch.full((128, 128), float(expert))
        for expert in range(4)
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    attention = {f"{ATTENTION}.{part}_proj.weight": torch.ones(64, 128) for part in "qkv"}
    gates = {f"{ATTENTION}.q_proj.weight": torch.ones(128, 128)}
    model.load_weights(weights | attention | gates, weight_mapper=mapper)
    module = model.get_submodule(EXPERTS)
    kernel = getattr(module, "backend", module)
    assert kernel.w2_weight.float().mean((1, 2)).tolist() == [0, 1, 2, 3]


# int4 experts.


def int4_experts(input_scale: dict[int, float], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        f"{expert}.{part}.{leaf}": tensor
        for expert in range(4)
        for part, rows, columns in (("w1", 128, 256), ("w3", 128, 256), ("w2", 256, 128))
        for leaf, tensor in {
            "weight": torch.full((rows // 2, columns), 0x11, dtype=torch.uint8),
            "weight_scale": torch.full((rows, columns // 128), 1.5),
            "weight_scale_2": torch.tensor(0.5),
            "pre_quant_scale": torch.ones(columns, dtype=dtype),
            **({"input_scale": torch.tensor(input_scale[expert])} if expert in input_scale else {}),
        }.items()
    }


@pytest.mark.parametrize("generation", ["mid", "newest"])
def test_int4_experts_read_input_scales_of_their_own_experts_only(generation: str) -> None:
    with engine_double.installed(generation):
        first, second = experts("W4A8_AWQ", 2, moe_ep_size=2)
        weights = int4_experts({0: 1.0, 1: 2.0})
        first.load_weights([weights])
        assert first.w3_w1_input_scale.tolist() == [1, 2]
        assert first.quant_method.dequantize(first, "w2", 0).eq(1.5).all()
        with pytest.raises(KeyError, match="input_scale"):
            second.load_weights([weights])


def test_early_int4_experts_read_another_layout() -> None:
    with engine_double.installed("old"), pytest.raises(KeyError, match="weight_scale_inv"):
        experts("W4A8_AWQ")[0].load_weights([int4_experts(dict.fromkeys(range(4), 1.0))])


def test_other_experts_read_input_scales_of_all_experts(engine: Any) -> None:
    first, _ = experts("FP8", 2, moe_ep_size=2)
    shapes = (("w1", 128, 256), ("w3", 128, 256), ("w2", 256, 128))
    weights = {
        f"{expert}.{part}.{leaf}": tensor
        for expert in range(4)
        for part, rows, columns in shapes
        for leaf, tensor in {
            "weight": torch.ones(rows, columns).to(torch.float8_e4m3fn),
            "weight_scale": torch.tensor(1.0),
            **({"input_scale": torch.tensor(1.0)} if expert < 2 else {}),
        }.items()
    }
    with pytest.raises(KeyError, match=r"2\.w1\.input_scale"):
        first.load_weights([weights])


@pytest.mark.parametrize("sm", [80, 100, 120])
@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
def test_int4_experts_run_on_sm89_and_sm90_only(generation: str, sm: int) -> None:
    with engine_double.installed(generation, sm=sm), pytest.raises(NotImplementedError, match=f"SM{sm}"):
        experts("W4A8_AWQ")


# Mappers.


def test_a_mapper_gets_all_weights_once_per_module_and_returns_its_parts(engine: Any) -> None:
    from tensorrt_llm._torch.models.checkpoints.hf.weight_mapper import HfWeightMapper

    calls: list[tuple[str, str, int]] = []

    class Recording(HfWeightMapper):
        def apply_callbacks(self, module: Any, module_name: str, module_names_breakdown: Any, weights: Any) -> Any:
            parts = super().apply_callbacks(module, module_name, module_names_breakdown, weights)
            calls.append((module_name, ".".join(module_names_breakdown), len(weights)))
            assert [sorted(part) for part in parts] == [["weight"]] * len(self.mapping[module_name])
            return parts

    model, mapper = decoder(LLAMA, None), Recording()
    mapper.init_model_and_config(model, model.model_config)
    shapes = {"self_attn": {"q_proj": 128, "k_proj": 64, "v_proj": 64}, "mlp": {"gate_proj": 128, "up_proj": 128}}
    weights = {
        f"model.layers.0.{parent}.{leaf}.weight": torch.ones(rows, 128)
        for parent, leaves in shapes.items()
        for leaf, rows in leaves.items()
    }
    model.load_weights(weights, weight_mapper=mapper)
    assert sorted(calls) == [("gate_up_proj", "model.layers.0.mlp", 5), ("qkv_proj", "model.layers.0.self_attn", 5)]


def test_a_mapper_does_not_check_that_a_module_has_a_configuration(engine: Any) -> None:
    from tensorrt_llm._torch.models.checkpoints.hf.weight_mapper import HfWeightMapper

    model, mapper = decoder(LLAMA, None), HfWeightMapper()
    mapper.init_model_and_config(model, model.model_config)
    module = linear("FP8", rows=192, fused="QKV")
    module.quant_config = None
    with pytest.raises(AttributeError, match="quant_mode"):
        mapper.apply_callbacks(module, "qkv_proj", ["self_attn"], {"self_attn.k_proj.weight": torch.ones(64, 128)})


# Model classes.


@pytest.mark.parametrize(
    "architecture",
    ["GraniteForCausalLM", "Gemma2ForCausalLM", "DeepseekV2ForCausalLM", "LlavaForConditionalGeneration"],
)
def test_a_class_that_stock_lacks_is_unknown(engine: Any, tmp_path: Path, architecture: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"architectures": [architecture]}))
    with pytest.raises(ValueError, match=f"Unknown architecture for AutoModelForCausalLM: {architecture}"):
        engine.LLM(model=tmp_path, skip_tokenizer_init=True)


def test_a_class_of_a_later_generation_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for generation in engine_double.GENERATIONS:
        with installed(generation):
            from tensorrt_llm._torch.models import _arch_index

            row = _arch_index.Row(MID, "modeling_decoder", "Decoder")
            monkeypatch.setitem(_arch_index.ARCHITECTURES, "NewForCausalLM", row)
            found[generation] = _arch_index.get_model_class("NewForCausalLM") is not None
    assert found == {OLD: False, MID: True, NEWEST: True}
