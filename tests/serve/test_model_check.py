"""The check of the engine's model against the plan: a Linear that is missing or has another mode raises."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import tiny_config, write_checkpoint
from engine_fixtures import BINDINGS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepared_directories import record_contents

from trtllm_ct import prepare
from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import LoadError
from trtllm_ct.base.schemes import QuantAlgo, TensorSpec
from trtllm_ct.engine.quant_config import LayerQuantConfig, QuantConfig
from trtllm_ct.plan.ops import Ones
from trtllm_ct.plan.plan import Delivery, ModulePlan, Plan
from trtllm_ct.serve.model_check import NO_MODEL_CHECK, check_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
PLAIN = (None, "NO_QUANT", "MIXED_PRECISION")
ALGOS = [algo for algo in QuantAlgo if algo is not QuantAlgo.MIXED_PRECISION]


@dataclass(frozen=True)
class Engine:
    """A module of the engine's model; one without `quant_config` stands for a norm or the like."""

    quant_config: Any = None


@dataclass(frozen=True)
class Config:
    quant_algo: Any


class Model:
    """A model that the engine's own loop loads; `named_modules` as torch has it."""

    def __init__(self, modules: Mapping[str, Any]) -> None:
        self._modules = dict(modules)

    def named_modules(self, *, remove_duplicate: bool) -> Iterator[tuple[str, Any]]:
        assert not remove_duplicate, "a tied module would be found under one name only"
        return iter(self._modules.items())

    def load_weights(self) -> None: ...


class OwnLoop(Model):
    """A model that overrides `load_weights`, and may know tensors under other names."""

    def load_weights(self) -> None: ...


Model.load_weights.__module__ = "tensorrt_llm._torch.models.modeling_utils"
OwnLoop.load_weights.__module__ = "tensorrt_llm._torch.models.modeling_special"


def quantized(algo: str | None) -> Engine:
    return Engine(Config(algo))


def module(name: str, algo: QuantAlgo | None = None, **more: Any) -> ModulePlan:
    delivery = Delivery(name=f"{name}.weight", operation=Ones(result=TensorSpec(DType.BF16, (1,))))
    layer = LayerQuantConfig(quant_algo=algo) if algo else None
    return ModulePlan(
        **{"name": name, "class_name": "Linear", "views": {}, "deliveries": (delivery,), "layer": layer} | more
    )


def plan_of(*modules: ModulePlan) -> Plan:
    return Plan(
        target="tensorrt_llm",
        architecture="LlamaForCausalLM",
        dtype=DType.BF16,
        dense_dtype=DType.BF16,
        stored={},
        modules=modules,
        quant_config=QuantConfig(),
        tied=False,
    )


def found(model: Model, *modules: ModulePlan) -> dict[str, str]:
    """What is found where something else was planned."""
    try:
        check_model(model, FUSED, plan_of(*modules))
    except LoadError as error:
        return {fault.where: fault.found for fault in error.faults}
    return {}


# One Linear at a time.


@pytest.mark.parametrize("algo", ALGOS)
def test_only_the_same_mode_passes(algo: QuantAlgo) -> None:
    planned = module("a.o_proj", algo)
    others = [str(other) for other in ALGOS if other is not algo]

    assert found(Model({"a.o_proj": quantized(str(algo))}), planned) == {}
    for other in others:
        assert found(Model({"a.o_proj": quantized(other)}), planned) == {
            "a.o_proj": f"{other} in TensorRT-LLM's a.o_proj"
        }


def test_a_fault_names_both_modes_and_a_remedy() -> None:
    with pytest.raises(LoadError) as caught:
        check_model(Model({"a.o_proj": quantized("FP8")}), FUSED, plan_of(module("a.o_proj", QuantAlgo.W4A16_AWQ)))

    (fault,) = caught.value.faults
    assert fault.where == "a.o_proj"
    assert fault.expected == "W4A16_AWQ, as it is delivered"
    assert fault.found == "FP8 in TensorRT-LLM's a.o_proj"
    assert "trtllm-ct convert --to dense" in fault.remedy
    assert f"{NO_MODEL_CHECK}=1" in fault.remedy


@pytest.mark.parametrize("algo", PLAIN)
def test_a_linear_that_the_engine_forgot_to_quantize_is_named(algo: str | None) -> None:
    """The engine ignores a name that matches nothing, and would copy codes into a plain weight."""
    model = Model({"a.o_proj": quantized(algo)})

    assert found(model, module("a.o_proj", QuantAlgo.FP8)) == {"a.o_proj": "a plain Linear in TensorRT-LLM's a.o_proj"}
    assert found(model, module("a.o_proj")) == {}


def test_a_linear_without_a_configuration_is_plain() -> None:
    model = Model({"a.o_proj": Engine(None)})

    assert found(model, module("a.o_proj")) == {}
    assert found(model, module("a.o_proj", QuantAlgo.FP8)) == {"a.o_proj": "a plain Linear in TensorRT-LLM's a.o_proj"}


def test_a_plain_linear_that_the_engine_quantizes_is_named() -> None:
    with pytest.raises(LoadError, match=r"a\.o_proj: expected a plain Linear, as it is delivered, found NVFP4 in"):
        check_model(Model({"a.o_proj": quantized("NVFP4")}), FUSED, plan_of(module("a.o_proj")))


def test_members_of_an_enumeration_are_compared_by_value() -> None:
    assert found(Model({"a.o_proj": quantized(QuantAlgo.FP8)}), module("a.o_proj", QuantAlgo.FP8)) == {}


def test_a_module_without_quant_config_is_skipped() -> None:
    """An example is a router that the engine does not implement as a Linear."""
    assert found(Model({"a.gate": object()}), module("a.gate", QuantAlgo.FP8), module("a.gate")) == {}


# Names.


@pytest.mark.parametrize("leaf", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
def test_parts_of_a_fused_linear_are_found_in_it(leaf: str) -> None:
    whole = "a.qkv_proj" if leaf[0] in "qkv" else "a.gate_up_proj"

    assert found(Model({whole: quantized("FP8")}), module(f"a.{leaf}", QuantAlgo.FP8)) == {}
    assert found(Model({whole: quantized("W8A16")}), module(f"a.{leaf}", QuantAlgo.FP8)) == {
        f"a.{leaf}": f"W8A16 in TensorRT-LLM's {whole}"
    }


def test_the_fused_linear_of_another_layer_does_not_count() -> None:
    model = Model({"b.qkv_proj": quantized("FP8"), "qkv_proj": quantized("FP8")})

    assert found(model, module("a.q_proj", QuantAlgo.FP8)) == {
        "a.q_proj": "none of that name, so that its tensors would stay unread"
    }


def test_an_unfused_part_takes_precedence_over_a_fused_linear() -> None:
    model = Model({"a.q_proj": quantized("FP8"), "a.qkv_proj": quantized("W8A16")})

    assert found(model, module("a.q_proj", QuantAlgo.FP8)) == {}


def test_experts_are_found_in_the_module_of_all_experts() -> None:
    expert = module("a.experts.3.up_proj", QuantAlgo.NVFP4, experts="a.experts")

    assert found(Model({"a.experts": quantized("NVFP4")}), expert) == {}
    assert found(Model({"a.experts": quantized("FP8")}), expert) == {
        "a.experts.3.up_proj": "FP8 in TensorRT-LLM's a.experts"
    }


@pytest.mark.parametrize("planned", [None, QuantAlgo.NVFP4])
@pytest.mark.parametrize("built", [None, "NVFP4", "W4A16_AWQ"])
def test_wrapped_experts_are_judged_by_their_backend(planned: QuantAlgo | None, built: str | None) -> None:
    """The wrapper gets the mode by its name; the kernel keeps the global one if no entry names it."""
    expert = module("a.experts.3.up_proj", planned, experts="a.experts")
    model = Model({"a.experts": quantized(planned and str(planned)), "a.experts.backend": quantized(built)})

    want = (
        {}
        if built == planned
        else {"a.experts.3.up_proj": f"{built or 'a plain Linear'} in TensorRT-LLM's a.experts.backend"}
    )
    assert found(model, expert) == want


@pytest.mark.parametrize("body", ["model.", "language_model.model.", "model.language_model."])
@pytest.mark.parametrize(("leaf", "whole"), [("o_proj", "o_proj"), ("q_proj", "qkv_proj")])
def test_the_text_model_of_a_wrapper_is_looked_through(body: str, leaf: str, whole: str) -> None:
    name = f"llm.model.layers.0.self_attn.{whole}"
    planned = module(f"{body}layers.0.self_attn.{leaf}", QuantAlgo.FP8)

    assert found(Model({name: quantized("FP8")}), planned) == {}
    assert found(Model({name: quantized(None)}), planned) == {planned.name: f"a plain Linear in TensorRT-LLM's {name}"}


def test_a_missing_plain_linear_passes() -> None:
    """A tied head has no module of its own. Plain weights are copied by name, so their mode can't be wrong."""
    assert found(Model({}), module("lm_head")) == {}


@pytest.mark.parametrize("more", [{"class_name": "RMSNorm"}, {"deliveries": ()}], ids=["no Linear", "not this rank's"])
def test_modules_that_this_rank_does_not_load_are_skipped(more: dict[str, Any]) -> None:
    assert found(Model({"a.o_proj": quantized("FP8")}), module("a.o_proj", **more), module("a.x", **more)) == {}


# Parameters.


class Parameters(torch.nn.Module):
    """A module of the engine with these parameters of its own."""

    def __init__(self, *names: str, elements: int = 1) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, torch.nn.Parameter(torch.full((elements,), torch.nan)))


UNWRITTEN = "none, so that it would keep whatever its memory held"


@pytest.mark.parametrize("local", ["weight", "bias", "A_log", "e_score_correction_bias", "sinks"])
def test_a_parameter_that_no_tensor_is_copied_to_is_named(local: str) -> None:
    assert found(Model({"a.norm": Parameters(local)})) == {f"a.norm.{local}": UNWRITTEN}
    assert found(OwnLoop({"a.norm": Parameters(local)})) == {}


def test_a_parameter_that_a_tensor_is_copied_to_passes() -> None:
    model = Model({"a.norm": Parameters("weight"), "a.qkv_proj": Parameters("weight")})

    assert found(model, module("a.norm", class_name="RMSNorm"), module("a.q_proj")) == {}


def test_a_parameter_in_a_module_of_the_whole_name_of_its_tensor_passes() -> None:
    """MiniMax-M2 has a holder for the correction of its router's scores."""
    model = Model({"a.moe": Parameters(), "a.moe.weight": Parameters("weight")})

    assert found(model, module("a.moe", class_name="MiniMaxM2MoE")) == {}
    assert found(model) == {"a.moe.weight.weight": UNWRITTEN}


def test_a_linear_whose_bias_is_not_delivered_is_named() -> None:
    linear = Parameters("weight", "bias", "weight_scale")
    linear.quant_config = Config("FP8")

    assert found(Model({"a.o_proj": linear}), module("a.o_proj", QuantAlgo.FP8)) == {"a.o_proj.bias": UNWRITTEN}


def test_a_parameter_that_two_modules_share_needs_one_tensor() -> None:
    head, table = Parameters("weight"), Parameters("weight")
    head.weight = table.weight

    assert found(Model({"lm_head": head, "model.embed_tokens": table}), module("model.embed_tokens")) == {}
    assert found(Model({"lm_head": head, "model.embed_tokens": table})).keys() == {
        "lm_head.weight",
        "model.embed_tokens.weight",
    }


def test_parameters_of_the_engine_itself_are_passed_over() -> None:
    assert found(Model({"a": Parameters("workspace", "alpha"), "b": Parameters("weight", elements=0)})) == {}


# Models with their own loading loop, and the environment variable.


def test_a_model_with_a_loop_of_its_own_may_use_other_names(caplog: pytest.LogCaptureFixture) -> None:
    """A missing Linear is then only logged; a different mode is still an error."""
    absent, other = module("a.o_proj", QuantAlgo.FP8), module("a.down_proj", QuantAlgo.FP8)
    model = OwnLoop({"a.down_proj": quantized("W8A16")})

    assert found(model, absent, other) == {"a.down_proj": "W8A16 in TensorRT-LLM's a.down_proj"}

    (line,) = caplog.messages
    assert line.startswith("a.o_proj: expected a module of TensorRT-LLM's model that loads it (FP8), found none")


def test_a_missing_linear_raises_in_the_engines_loop(caplog: pytest.LogCaptureFixture) -> None:
    assert found(Model({}), module("a.o_proj", QuantAlgo.FP8)).keys() == {"a.o_proj"}
    assert caplog.messages == []


@pytest.mark.parametrize(("value", "off"), [(None, False), ("", False), ("0", False), ("1", True), ("yes", True)])
def test_the_environment_variable_turns_errors_into_warnings(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str | None, off: bool
) -> None:
    monkeypatch.delenv(NO_MODEL_CHECK, raising=False)
    if value is not None:
        monkeypatch.setenv(NO_MODEL_CHECK, value)
    modules = module("a.o_proj", QuantAlgo.FP8), module("a.down_proj", QuantAlgo.W4A16_AWQ)

    faults = found(Model({"a.o_proj": quantized("W8A16")}), *modules)

    assert faults.keys() == (set() if off else {"a.o_proj", "a.down_proj"})
    assert [line.partition(":")[0] for line in caplog.messages] == (["a.o_proj", "a.down_proj"] if off else [])
    assert all(record.levelno == logging.WARNING for record in caplog.records)


# All cases together, against a table of planned and built modes.

MODES = st.sampled_from([None, QuantAlgo.FP8, QuantAlgo.W4A16_AWQ])
ABSENT = "absent"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    planned=st.dictionaries(st.sampled_from(["a.o_proj", "a.down_proj", "b.o_proj", "lm_head"]), MODES),
    there=st.dictionaries(
        st.sampled_from(["a.o_proj", "a.down_proj", "b.o_proj", "lm_head"]),
        st.sampled_from([*PLAIN, "FP8", "W4A16_AWQ", "W8A16", ABSENT]),
    ),
    own_loop=st.booleans(),
)
def test_exactly_the_differences_are_named(
    planned: dict[str, QuantAlgo | None], there: dict[str, Any], own_loop: bool
) -> None:
    kind = OwnLoop if own_loop else Model
    model = kind({name: quantized(algo) for name, algo in there.items() if algo != ABSENT})
    wrong = set()
    for name, algo in planned.items():
        if there.get(name, ABSENT) == ABSENT:
            wrong |= {name} if algo is not None and not own_loop else set()
        elif (there[name] if there[name] not in PLAIN else None) != algo:
            wrong.add(name)

    assert found(model, *(module(name, algo) for name, algo in planned.items())).keys() == wrong


# On the double: the configuration that the engine reads was changed.


@pytest.fixture
def made(sidecar_cache: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a sidecar after an edit of one of its files."""

    def make(scheme: Any, name: str = "", edit: Callable[[dict[str, Any]], object] = dict) -> Path:
        config = tiny_config(hidden=128, layers=1)
        sidecar = prepare(write_checkpoint(tmp_path / "model", config=config, scheme=scheme).directory)
        if name:
            document = json.loads((sidecar / name).read_text())
            edit(document)
            (sidecar / name).write_text(json.dumps(document))
            record_contents(sidecar)
        return sidecar

    return make


def load(engine: Any, directory: Path) -> None:
    loader = import_module(BINDINGS).CompressedTensorsCheckpointLoader()
    engine.LLM(model=str(directory), checkpoint_loader=loader, skip_tokenizer_init=True)


def test_an_exclusion_outside_the_plan_raises(engine: Any, made: Callable[..., Path]) -> None:
    def exclude(document: dict[str, Any]) -> None:
        document["quantization"]["exclude_modules"].append("model.layers.0.self_attn.k_proj")

    with pytest.raises(LoadError) as caught:
        load(engine, made("int8-channel", "hf_quant_config.json", exclude))

    home = "model.layers.0.self_attn"
    assert {fault.where for fault in caught.value.faults} == {f"{home}.{part}_proj" for part in "qkv"}
    assert {fault.found for fault in caught.value.faults} == {f"a plain Linear in TensorRT-LLM's {home}.qkv_proj"}


def test_a_layer_without_an_entry_raises(engine: Any, made: Callable[..., Path]) -> None:
    """Without its entry the layer would be a plain Linear, and load int8 codes as values."""
    scheme = {"o_proj": "fp8-channel-token", "down_proj": "int8-channel"}

    def forget(document: dict[str, Any]) -> None:
        layers = document.get("quantization", document)["quantized_layers"]
        del layers["model.layers.0.mlp.down_proj"]

    sidecar = made(scheme, "quant_cfg.json", forget)
    document = json.loads((sidecar / "hf_quant_config.json").read_text())
    document["quantization"].get("quantized_layers", {}).pop("model.layers.0.mlp.down_proj", None)
    (sidecar / "hf_quant_config.json").write_text(json.dumps(document))
    record_contents(sidecar)

    with pytest.raises(LoadError, match=r"mlp\.down_proj: expected W8A16, as it is delivered, found a plain Linear"):
        load(engine, sidecar)


@pytest.mark.parametrize(
    "scheme",
    ["int8-channel", {"o_proj": "fp8-channel-token", "down_proj": "int8-channel"}, "int4-g32"],
    ids=["one mode", "several", "none"],
)
def test_an_unchanged_sidecar_passes(engine: Any, made: Callable[..., Path], scheme: Any) -> None:
    load(engine, made(scheme))
