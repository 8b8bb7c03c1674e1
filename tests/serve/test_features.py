"""Features are found from signatures and members of the engine, in any combination, and never from its version."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch
from engine_fixtures import BINDINGS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trtllm_ct.base.errors import UsageError
from trtllm_ct.engine.releases import DEFAULT_ENGINE
from trtllm_ct.engine.target import ENGINES
from trtllm_ct.serve.features import (
    DEFAULT_FEATURES,
    EngineFeatures,
    EngineParts,
    probe_features,
)
from trtllm_ct.serve.patch_switch import NO_PATCH, patch_allowed
from trtllm_ct.serve.prepare import installed_features

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

# The algorithms of TensorRT-LLM 1.0 (`quantization/mode.py`) that can be planned for, and those that main adds.
FIRST = (
    "W4A16",
    "W4A16_AWQ",
    "W8A16",
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_BLOCK_SCALES",
    "NVFP4",
    "W4A16_MXFP4",
)
MIDDLE = ("W4A8_MXFP4_MXFP8", "W4A8_AWQ")
LATER = ("MXFP8", "W4A16_NVFP4")
GEMM = ("input", "weight", "scales", "group_size", "has_zero_point", "output_dtype", "alpha", "bias", "zeros")


class Method:
    """An AWQ method with everything that the installed method needs."""

    create_weights = apply = load_weights_vanilla = lambda self: None
    load_weights_fused_qkv_linear = load_weights_fused_gate_up_linear = lambda self: None


class OwnGptq:
    """The engine's own method for asymmetric int4."""


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NO_PATCH, raising=False)


@pytest.fixture
def gemm(monkeypatch: pytest.MonkeyPatch) -> Callable[[Collection[str]], None]:
    """Register the grouped GEMM, as every release does; call the fixture to register it with other arguments."""

    def register(names: Collection[str]) -> None:
        arguments = [SimpleNamespace(name=name) for name in names]
        packet = SimpleNamespace(default=SimpleNamespace(_schema=SimpleNamespace(arguments=arguments)))
        monkeypatch.setattr(torch.ops.trtllm, "finegrained_mixed_dtype_gemm", packet, raising=False)

    register(GEMM)
    return register


def parts(
    members: Collection[str] = (*FIRST, *MIDDLE, "W4A16_GPTQ"),
    *,
    mapping: bool = True,
    dynamic: str | None = None,
    honoured: bool = True,
    parser: bool = False,
    own_gptq: bool = False,
    buildable: bool = True,
    version: str | None = None,
) -> EngineParts:
    """Return an engine with these parts.

    `dynamic` says where `LLM` has `force_dynamic_quantization`, if anywhere, and `honoured` whether attention reads it.
    """
    algos = SimpleNamespace(__members__={name: name for name in members}, **{name: name for name in members})

    def get_quant_method(config: Any) -> Any:
        if config.quant_algo == "W4A16_GPTQ" and own_gptq:
            return OwnGptq()
        raise ValueError(f"unsupported quant mode: {config.quant_algo}")

    def with_mapping(self: Any, checkpoint_dir: str, mapping: Any, **kwargs: Any) -> None: ...

    def without_mapping(self: Any, checkpoint_dir: str, **kwargs: Any) -> None: ...

    def fields(name: str) -> dict[str, Any]:
        return {"model_fields": {"model": 0, **({"force_dynamic_quantization": 0} if dynamic == name else {})}}

    def with_argument(self: Any, model: str, force_dynamic_quantization: bool = False) -> None: ...

    def dynamic_output(self: Any) -> bool:
        return not self.o_proj.force_dynamic_quantization

    def any_output(self: Any) -> bool:
        return bool(self.has_quant_scale)

    constructor = {"__init__": with_argument} if dynamic == "constructor" else {}
    linear = SimpleNamespace(
        __name__="linear", QuantAlgo=algos, QuantConfig=SimpleNamespace, get_quant_method=get_quant_method
    )
    if buildable:
        linear.W4A16_AWQ_LinearMethod, linear.load_weight_shard = Method, lambda weight: weight
    return EngineParts(
        linear=linear,
        attention=type("Attention", (), {"_use_quantize_output": dynamic_output if honoured else any_output}),
        llm_args=type("TorchLlmArgs", (), constructor or fields("fields")),
        llm_utils=SimpleNamespace(**({"update_quant_config_from_compressed_tensors": print} if parser else {})),
        weight_loader=type("BaseWeightLoader", (), {"load_weights": with_mapping if mapping else without_mapping}),
        version=version,
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    later=st.sets(st.sampled_from(LATER)),
    more=st.sets(st.sampled_from(["W4A16_GPTQ", "INT8", "NVFP4_ARC", "NO_QUANT"])),
    mapping=st.booleans(),
    dynamic=st.sampled_from([None, "fields", "constructor"]),
    honoured=st.booleans(),
    parser=st.booleans(),
    own_gptq=st.booleans(),
    buildable=st.booleans(),
    version=st.none() | st.sampled_from(["0.9", "1.0.0", "99.0rc1", "main", ""]),
)
def test_each_feature_is_found_independently(gemm: Any, later: set[str], more: set[str], **signs: Any) -> None:
    features = probe_features(parts({*FIRST, *MIDDLE, *later, *more}, **signs))

    newest = "stock-1.3" if later == set(LATER) else "stock-1.2"
    known = "W4A16_GPTQ" in more
    assert features == EngineFeatures(
        engine=newest if signs["mapping"] else "stock-1.0",
        additive_zeros=known and (signs["own_gptq"] or signs["buildable"]),
        has_own_gptq=known and signs["own_gptq"],
        force_dynamic_quantization=signs["dynamic"] is not None and signs["honoured"],
        mapping_argument=signs["mapping"],
        compressed_tensors_parser=signs["parser"],
        version=signs["version"],
    )


def test_an_attention_without_that_function_honours_nothing(gemm: Any) -> None:
    unknown = replace(parts(dynamic="fields"), attention=type("Attention", (), {}))

    assert not probe_features(unknown).force_dynamic_quantization


@pytest.mark.parametrize("version", [None, "", "0.1", "1.0.0", "1.2.0", "99.9.9", "not a version"])
def test_the_version_is_shown_and_decides_nothing(gemm: Any, version: str | None) -> None:
    found = {probe_features(parts(mapping=mapping, version=version)).engine for mapping in (True, False)}

    assert found == {"stock-1.2", "stock-1.0"}
    assert probe_features(parts(version=version)).version == version


@pytest.mark.parametrize("lost", FIRST)
def test_an_engine_that_is_too_old_raises_and_names_what_it_lacks(gemm: Any, lost: str) -> None:
    members = {*FIRST, *MIDDLE, *LATER, "W4A16_GPTQ"} - {lost}

    with pytest.raises(UsageError) as caught:
        probe_features(parts(members))

    (fault,) = caught.value.faults
    assert fault.where == "tensorrt_llm.quantization.QuantAlgo"
    assert (fault.expected, fault.found) == ("the algorithms of stock-1.0", f"no {lost}")
    assert fault.remedy == "Install TensorRT-LLM 1.0 or newer."


def test_all_missing_algorithms_are_named_together() -> None:
    with pytest.raises(UsageError) as caught:
        probe_features(parts({"FP8"}))

    assert caught.value.faults[0].found == f"no {', '.join(sorted({*FIRST} - {'FP8'}))}"


def test_the_first_names_are_the_oldest_set() -> None:
    """The names above must match the sets in the table; otherwise these tests would prove nothing."""
    sets = {name: {str(algo) for algo in each.linear | each.experts} for name, each in ENGINES.items()}

    assert sets == {"stock-1.0": {*FIRST}, "stock-1.2": {*FIRST, *MIDDLE}, "stock-1.3": {*FIRST, *MIDDLE, *LATER}}


@pytest.mark.parametrize("lost", range(len(GEMM)), ids=GEMM)
def test_a_gemm_without_an_argument_means_no_additive_zeros(lost: int, gemm: Callable[[Collection[str]], None]) -> None:
    gemm(GEMM[:lost] + GEMM[lost + 1 :])

    assert probe_features(parts()).additive_zeros is (GEMM[lost] == "alpha")
    assert probe_features(parts(own_gptq=True)).additive_zeros


def test_an_unregistered_gemm_means_no_additive_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.trtllm, "finegrained_mixed_dtype_gemm", None, raising=False)

    assert not probe_features(parts()).additive_zeros


# The environment variable.


@pytest.mark.parametrize(
    ("value", "allowed"), [(None, True), ("", True), ("0", True), ("1", False), ("true", False), (" ", False)]
)
def test_the_environment_variable_forbids_only_this_packages_method(
    gemm: Any, monkeypatch: pytest.MonkeyPatch, value: str | None, allowed: bool
) -> None:
    if value is not None:
        monkeypatch.setenv(NO_PATCH, value)

    assert patch_allowed() is allowed
    assert probe_features(parts()).additive_zeros is allowed
    own = probe_features(parts(own_gptq=True))
    assert (own.additive_zeros, own.has_own_gptq) == (True, True)


@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
def test_the_environment_variable_on_the_double(monkeypatch: pytest.MonkeyPatch, generation: str) -> None:
    monkeypatch.setenv(NO_PATCH, "1")
    with engine_double.installed(generation, importers=[BINDINGS]):
        features = import_module(BINDINGS).engine_features()
    assert (features.additive_zeros, features.has_own_gptq) == (False, False)


# Whole engines.

OLD = EngineFeatures(engine="stock-1.0", mapping_argument=False, version="1.1.0")
MID = EngineFeatures(engine="stock-1.2", version="1.2.1")
NEWEST = EngineFeatures(
    engine="stock-1.3",
    has_own_gptq=False,
    force_dynamic_quantization=True,
    compressed_tensors_parser=True,
    version="1.4.0rc1",
)


EXPECTED = (OLD, MID, NEWEST)


@pytest.mark.parametrize(("generation", "expected"), list(zip(engine_double.GENERATIONS, EXPECTED, strict=True)))
def test_the_double_is_the_release_that_it_imitates(generation: str, expected: EngineFeatures) -> None:
    assert expected.engine == engine_double.RELEASE_OF[generation]
    with engine_double.installed(generation, importers=[BINDINGS]) as engine:
        features = import_module(BINDINGS).engine_features()
        assert installed_features() == features
        assert replace(features, model_classes=frozenset()) == expected
        assert "LlamaForCausalLM" in features.model_classes
        assert "GraniteForCausalLM" not in features.model_classes
        assert "model_classes" not in features.to_dict()
        assert features.version == engine.__version__


def test_a_release_with_its_own_method_is_found() -> None:
    with engine_double.installed("newest", gptq=True, importers=[BINDINGS]):
        features = import_module(BINDINGS).engine_features()
    assert (features.has_own_gptq, features.additive_zeros) == (True, True)


def test_another_version_string_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_double.installed("old", importers=[BINDINGS]) as engine:
        monkeypatch.setattr(engine, "__version__", "99.0.0")
        features = import_module(BINDINGS).engine_features()
    assert features.engine == "stock-1.0"
    assert features.version == "99.0.0"


def test_installing_the_method_does_not_change_the_features() -> None:
    """A second `LLM` in a process must be planned in the same way as the first."""
    with engine_double.installed("newest", importers=[BINDINGS]):
        linear = import_module("tensorrt_llm._torch.modules.linear")
        bindings = import_module(BINDINGS)
        before = bindings.engine_features()
        assert bindings.install_additive_zeros(linear)
        assert bindings.engine_features() == before


def test_without_an_engine_the_newest_stable_line_is_assumed() -> None:
    assert installed_features() is DEFAULT_FEATURES
    assert DEFAULT_FEATURES.engine == DEFAULT_ENGINE
    assert DEFAULT_FEATURES.additive_zeros
    assert DEFAULT_FEATURES.version is None


@pytest.mark.parametrize("features", [DEFAULT_FEATURES, *EXPECTED], ids=["none", *engine_double.GENERATIONS])
def test_features_survive_json(features: EngineFeatures) -> None:
    assert EngineFeatures(**json.loads(json.dumps(features.to_dict()))) == features
