from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from installed_transformers import in_dtype, typed_config
from torch import Tensor

from trtllm_ct.base.errors import ConfigError, MissingDependencyError, PlanError, UsageError
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.quant_config import LayerQuantConfig, QuantConfig
from trtllm_ct.reference import ReferenceLinear, build_model, load_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.reference

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "quantization_config": {"quant_method": "compressed-tensors"},
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
LAYER = "model.layers.0"
TOKENS = torch.tensor([[3, 7, 1, 30, 12, 5]])
MIXED = {
    f"{LAYER}.self_attn.q_proj": QuantAlgo.W8A16,
    f"{LAYER}.self_attn.k_proj": QuantAlgo.FP8,
    f"{LAYER}.self_attn.v_proj": QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN,
    f"{LAYER}.self_attn.o_proj": QuantAlgo.W4A16_AWQ,
    f"{LAYER}.mlp.gate_proj": QuantAlgo.W4A16,
    f"{LAYER}.mlp.up_proj": QuantAlgo.W4A16_GPTQ,
    "lm_head": QuantAlgo.W8A16,
}
SMALL_FLOATS = {
    f"{LAYER}.self_attn.q_proj": QuantAlgo.NVFP4,
    f"{LAYER}.self_attn.o_proj": QuantAlgo.W4A16_NVFP4,
    f"{LAYER}.mlp.gate_proj": QuantAlgo.MXFP8,
    f"{LAYER}.mlp.up_proj": QuantAlgo.FP8_BLOCK_SCALES,
    f"{LAYER}.mlp.down_proj": QuantAlgo.W4A16_MXFP4,
}


@pytest.fixture(scope="module")
def dense() -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    fields = {key: value for key, value in CONFIG.items() if key not in {"quantization_config", "torch_dtype"}}
    model = AutoModelForCausalLM.from_config(typed_config(**fields))
    return {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}


def build(tensors: dict[str, Tensor], quant_config: QuantConfig | None = None, **options: Any) -> Any:
    return build_model(CONFIG, quant_config, tensors.items(), **({"dtype": torch.float32, "name": "tiny"} | options))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def quantize_all(
    dense: dict[str, Tensor],
    random_linear: Callable[..., tuple[LayerQuantConfig, dict[str, Tensor]]],
    modes: dict[str, QuantAlgo] = MIXED,
) -> tuple[QuantConfig, dict[str, Tensor]]:
    """Replace the weight of every Linear in `modes` by random delivered tensors."""
    tensors, layers = dict(dense), {}
    for seed, (module, algo) in enumerate(modes.items()):
        rows, columns = tensors.pop(f"{module}.weight").shape
        layers[module], delivered = random_linear(algo, rows, columns, seed)
        tensors |= {f"{module}.{name}": tensor for name, tensor in delivered.items()}
    return QuantConfig(quantized_layers=layers), tensors


@pytest.mark.parametrize("modes", [MIXED, SMALL_FLOATS], ids=["mixed", "small floats"])
def test_a_mixed_model_equals_the_dense_model_of_its_decoded_weights(
    dense: dict[str, Tensor], random_linear: Any, decode_slowly: Any, modes: dict[str, QuantAlgo]
) -> None:
    """Models with several algorithms are compared with transformers' own Linears and weights of the slow decoder."""
    quant_config, tensors = quantize_all(dense, random_linear, modes)
    decoded = dict(dense)
    for module, algo in modes.items():
        delivered = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.rpartition(".")[0] == module}
        weight = decode_slowly(algo, delivered)
        decoded[f"{module}.weight"] = (weight * delivered.get("pre_quant_scale", torch.ones(1)).double()).float()

    got = build(tensors, quant_config, quantize_activations=False)

    assert torch.allclose(logits(build(decoded)), logits(got), atol=1e-5)
    assert {name for name, module in got.named_modules() if isinstance(module, ReferenceLinear)} == set(modes)


def test_activation_quantization_can_be_switched_off(dense: dict[str, Tensor], random_linear: Any) -> None:
    quant_config, tensors = quantize_all(dense, random_linear)

    on, off = (logits(build(tensors, quant_config, quantize_activations=flag)) for flag in (True, False))

    assert on.isfinite().all()
    assert not torch.equal(on, off)


def test_the_state_is_exactly_what_was_delivered(dense: dict[str, Tensor], random_linear: Any) -> None:
    """With float32 as the compute dtype, nothing is cast: names, dtypes and values stay the same."""
    quant_config, tensors = quantize_all(dense, random_linear)

    state = build(tensors, quant_config).state_dict()

    assert state.keys() == tensors.keys()
    assert all(state[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert all(torch.equal(state[name].double(), tensor.double()) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_compute_dtype_is_the_callers(dense: dict[str, Tensor], random_linear: Any, dtype: torch.dtype) -> None:
    quant_config, tensors = quantize_all(dense, random_linear)

    model = build(tensors, quant_config, dtype=dtype)

    assert logits(model).dtype == dtype
    assert model.dtype == dtype
    assert model.get_buffer(f"{LAYER}.mlp.up_proj.weight_zero").dtype == torch.float32


def test_the_model_is_ready_to_evaluate(dense: dict[str, Tensor]) -> None:
    model = build(dense)

    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.name_or_path == "tiny"
    assert not hasattr(model.config, "quantization_config")


def test_old_checkpoints_may_store_rotary_frequencies(dense: dict[str, Tensor]) -> None:
    build(dense | {f"{LAYER}.self_attn.rotary_emb.inv_freq": torch.ones(2)})


W8A16 = LayerQuantConfig(quant_algo=QuantAlgo.W8A16)
DOWN = f"{LAYER}.mlp.down_proj"
CODES = {f"{DOWN}.weight": torch.ones(32, 64, dtype=torch.int8), f"{DOWN}.weight_scale": torch.ones(32)}
ONLY_DOWN = QuantConfig(quantized_layers={DOWN: W8A16})
FP8_KV = QuantConfig(kv_cache_quant_algo="FP8")
K_SCALE, V_SCALE = f"{LAYER}.self_attn.k_proj.k_scale", f"{LAYER}.self_attn.v_proj.v_scale"
ELSEWHERE = "model.layers.9.self_attn.k_proj.k_scale"
ONE, W = torch.ones(()), torch.ones(64, 32)


@pytest.mark.parametrize(
    ("quant_config", "changes", "wheres", "remedy"),
    [
        (None, {"model.norm.weight": None}, ["model.norm.weight"], "no shard is missing"),
        (None, {f"{LAYER}.self_attn.q_proj.bias": None}, [f"{LAYER}.self_attn.q_proj.bias"], "no shard is missing"),
        (None, {"model.layers.1.mlp.up_proj.weight": W}, ["model.layers.1.mlp.up_proj.weight"], "prefix"),
        (None, {"model.norm.weight": torch.ones(8)}, ["model.norm.weight"], "another model"),
        (None, {f"{DOWN}.weight_scale": torch.ones(32)}, [f"{DOWN}.weight_scale"], "exclude_modules"),
        (None, CODES, [f"{DOWN}.weight", f"{DOWN}.weight_scale"], "quantized"),
        (None, {K_SCALE: ONE}, [K_SCALE], "kv_cache_quant_algo"),
        (ONLY_DOWN, {}, [DOWN, f"{DOWN}.weight"], "exclude_modules"),
        (ONLY_DOWN, {f"{DOWN}.weight": None}, [DOWN], "exclude_modules"),
        (
            QuantConfig(quantized_layers={"layers.0.mlp.down_proj": W8A16}),
            CODES,
            ["quantized_layers: layers.0.mlp.down_proj", f"{DOWN}.weight", f"{DOWN}.weight_scale"],
            "prefix",
        ),
        (
            QuantConfig(quantized_layers={"model.embed_tokens": W8A16}),
            {},
            ["quantized_layers: model.embed_tokens"],
            "tie_word_embeddings",
        ),
        (FP8_KV, {K_SCALE: ONE}, [V_SCALE], "or of none"),
        (FP8_KV, {K_SCALE: 0 * ONE, V_SCALE: -ONE}, [K_SCALE, V_SCALE], "multiplies"),
        (FP8_KV, {K_SCALE: ONE * torch.nan, V_SCALE: ONE * torch.inf}, [K_SCALE, V_SCALE], "multiplies"),
        (FP8_KV, {K_SCALE: torch.ones(2), V_SCALE: ONE.half()}, [K_SCALE, V_SCALE], "multiplies"),
        (FP8_KV, {K_SCALE: ONE, V_SCALE: ONE, ELSEWHERE: ONE}, [ELSEWHERE], "config.json"),
    ],
)  # fmt: skip
def test_disagreements_are_faults_that_name_the_tensor(
    dense: dict[str, Tensor],
    quant_config: QuantConfig | None,
    changes: dict[str, Tensor | None],
    wheres: list[str],
    remedy: str,
) -> None:
    tensors = {name: tensor for name, tensor in (dense | changes).items() if tensor is not None}

    with pytest.raises(PlanError) as caught:
        build(tensors, quant_config)

    assert sorted(fault.where for fault in caught.value.faults) == sorted(wheres)
    assert any(remedy in fault.remedy for fault in caught.value.faults)


def test_all_faults_are_raised_together(dense: dict[str, Tensor]) -> None:
    tensors = {name: tensor for name, tensor in dense.items() if "layernorm" not in name}
    tensors |= {f"{DOWN}.weight_scale": torch.ones(3), "surplus": torch.ones(1)}

    with pytest.raises(PlanError) as caught:
        build(tensors, ONLY_DOWN)

    assert len(caught.value.faults) == 2 + 2 + 1  # two norms; codes and scale of one module; one surplus


def test_each_name_is_delivered_once(dense: dict[str, Tensor]) -> None:
    twice = [*dense.items(), ("model.norm.weight", dense["model.norm.weight"])]

    with pytest.raises(PlanError, match=r"^model\.norm\.weight: expected one tensor of this name"):
        build_model(CONFIG, None, twice, name="tiny")


def test_an_unknown_architecture_is_a_config_error(dense: dict[str, Tensor]) -> None:
    with pytest.raises(ConfigError, match="model_type 'no_such_model'"):
        build_model(CONFIG | {"model_type": "no_such_model"}, None, dense.items(), name="tiny")


@pytest.mark.parametrize("wrong", [{"hidden_size": "many"}, {"hidden_act": "none"}, {"model_type": "clip"}], ids=str)
def test_a_config_that_transformers_refuses_is_a_config_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"tiny: config\.json"):
        build_model(CONFIG | wrong, None, [], name="tiny")


@pytest.mark.parametrize("algo", ["NVFP4", "INT8"])
def test_other_kv_caches_are_refused_unless_switched_off(dense: dict[str, Tensor], algo: str) -> None:
    quant_config = QuantConfig(kv_cache_quant_algo=algo)

    with pytest.raises(PlanError, match=f"found {algo}. Pass quantize_activations=False"):
        build(dense, quant_config)
    assert torch.equal(logits(build(dense)), logits(build(dense, quant_config, quantize_activations=False)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_only_wide_floats_compute(dense: dict[str, Tensor], dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match="bfloat16, float16, float32 or float64"):
        build(dense, dtype=dtype)


def test_tied_embeddings_may_be_delivered_once_or_twice(save_tiny: Callable[..., Path]) -> None:
    directory = save_tiny("llama_tied")
    config = json.loads((directory / "config.json").read_text())
    weights = load_model(directory, dtype=torch.float32).state_dict()
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"

    def rebuild(names: set[str], **changes: Tensor) -> Any:
        delivered = {name: weights[name] for name in weights if name not in {head, embedding} - names} | changes
        return build_model(config, None, delivered.items(), dtype=torch.float32, name="tiny")

    for names in ({embedding}, {head}, {head, embedding}):
        model = rebuild(names)

        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(weights[head], model.lm_head.weight)
    with pytest.raises(PlanError, match="tie_word_embeddings"):
        rebuild({embedding}, **{head: weights[head] + 1})
    with pytest.raises(PlanError, match=rf"^{embedding}: expected a tensor"):
        rebuild(set())


def test_a_tied_head_is_dense_whatever_the_configuration_says(save_tiny: Callable[..., Path]) -> None:
    """A global algorithm applies only to Linears with a weight of their own, even if `lm_head` is not excluded."""
    directory = save_tiny("llama_tied", num_hidden_layers=0)
    config = json.loads((directory / "config.json").read_text())
    weights = load_model(directory).state_dict()

    build_model(config, QuantConfig(layer=W8A16), weights.items(), name="tiny")
    with pytest.raises(PlanError, match=r"^quantized_layers: lm_head: expected .* found one tied to the embeddings"):
        build_model(config, QuantConfig(quantized_layers={"lm_head": W8A16}), weights.items(), name="tiny")


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_directories_equal_transformers(
    save_tiny: Callable[..., Path], architecture: str, dtype: torch.dtype
) -> None:
    """Modules, tensors and buffers are the same, so logits are bit-identical whatever dtype the file has."""
    from transformers import AutoModelForCausalLM

    directory = save_tiny(architecture)
    tokens = torch.arange(2, 22)[None]

    want = AutoModelForCausalLM.from_pretrained(directory, **in_dtype(dtype)).eval()
    got = load_model(directory, dtype=dtype)

    with torch.no_grad():
        assert torch.equal(want(tokens).logits, got(tokens).logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(want.generate(tokens, **options), got.generate(tokens, **options))


def test_both_spellings_of_rotary_parameters_mean_the_same(save_tiny: Callable[..., Path]) -> None:
    directory = save_tiny("llama")
    config = json.loads((directory / "config.json").read_text())
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"], **config["rope_scaling"]}
    newer = {"rope_parameters": rope}
    older = {"rope_theta": rope["rope_theta"], "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}}
    weights = load_model(directory, dtype=torch.float32).state_dict()
    without = {key: value for key, value in config.items() if key not in newer | older}

    models = [
        build_model(variant, None, weights.items(), dtype=torch.float32, name="tiny")
        for variant in (without | newer, without | newer | older, without | older)
    ]

    assert torch.equal(logits(models[0]), logits(models[1]))
    assert torch.equal(logits(models[0]), logits(models[2]))


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(MissingDependencyError, match=r"pip install 'trtllm-ct\[reference\]'"):
        load_model(tmp_path)


def test_an_older_transformers_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "4.53.0")

    with pytest.raises(MissingDependencyError, match=r"release 4\.53\.0, older than 4\.53\.1.*trtllm-ct\[reference\]"):
        load_model(tmp_path)


def test_parameters_take_no_memory_before_they_are_delivered(dense: dict[str, Tensor]) -> None:
    """Building a model of 700 MB without any tensor writes no memory; the only faults are the missing tensors."""
    large = CONFIG | {"vocab_size": 10**7, "intermediate_size": 10**6}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pytest.raises(PlanError) as caught:
        build_model(large, None, [], name="large")

    assert len(caught.value.faults) == len(dense)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)


def test_loading_opens_no_socket_and_prints_nothing(
    save_tiny: Callable[..., Path], no_network: None, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = save_tiny("qwen3")
    (directory / "generation_config.json").write_text(
        '{"temperature": 0.6, "do_sample": false, "eos_token_id": [1, 2]}'
    )
    capfd.readouterr()

    model: Any = load_model(directory)

    assert capfd.readouterr() == ("", "")
    assert model.generation_config.eos_token_id == [1, 2]


def test_a_broken_generation_config_is_a_config_error(save_tiny: Callable[..., Path]) -> None:
    directory = save_tiny("llama")
    (directory / "generation_config.json").write_text("{")

    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        load_model(directory)
