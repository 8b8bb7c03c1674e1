from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.quant_config import LayerQuantConfig, QuantConfig

AWQ = LayerQuantConfig(quant_algo=QuantAlgo.W4A16_AWQ, group_size=128, pre_quant_scale=True)
FP8 = LayerQuantConfig(quant_algo=QuantAlgo.FP8)

LAYERS = st.one_of(
    st.builds(LayerQuantConfig, quant_algo=st.sampled_from([QuantAlgo.FP8, QuantAlgo.W4A16, QuantAlgo.W8A16])),
    st.builds(
        LayerQuantConfig,
        quant_algo=st.sampled_from([QuantAlgo.W4A16_AWQ, QuantAlgo.W4A16_GPTQ]),
        group_size=st.sampled_from([64, 128]),
        has_zero_point=st.booleans(),
        pre_quant_scale=st.booleans(),
    ),
)
COMMON = {
    "kv_cache_quant_algo": st.sampled_from([None, "FP8"]),
    "exclude_modules": st.lists(st.text(max_size=5)).map(tuple),
}
CONFIGS = st.one_of(
    st.builds(QuantConfig, layer=st.none() | LAYERS, **COMMON),
    st.builds(QuantConfig, quantized_layers=st.dictionaries(st.text(), LAYERS), **COMMON),
)


@settings(max_examples=50)
@given(CONFIGS)
def test_json_keeps_everything(config: QuantConfig) -> None:
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_global_algorithm_follows_from_the_layers() -> None:
    assert QuantConfig().quant_algo is None
    assert QuantConfig(layer=AWQ).quant_algo is QuantAlgo.W4A16_AWQ
    assert QuantConfig(quantized_layers={"a": AWQ}).quant_algo is QuantAlgo.MIXED_PRECISION


def test_the_fields_of_one_mode_are_those_of_the_whole_model() -> None:
    one, mixed = QuantConfig(layer=AWQ), QuantConfig(quantized_layers={"a": AWQ})

    assert (one.group_size, one.has_zero_point, one.pre_quant_scale) == (128, False, True)
    assert (mixed.group_size, mixed.has_zero_point, mixed.pre_quant_scale) == (None, False, False)


def test_the_mode_of_a_module() -> None:
    """Excluded modules have no mode; in a mixed configuration only the named modules have one."""
    one = QuantConfig(layer=AWQ, exclude_modules=("lm_head",))
    mixed = QuantConfig(quantized_layers={"a": FP8, "b": AWQ}, exclude_modules=("b",))

    assert [one.layer_config(name) for name in ("a", "lm_head")] == [AWQ, None]
    assert [mixed.layer_config(name) for name in ("a", "b", "c")] == [FP8, None, None]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.1.mlp.experts", FP8),
        ("model.layers.1.mlp.experts.17.down_proj", FP8),
        ("model.layers.1.mlp.expert", None),
        ("model.layers.1.mlp.experts_of_another_kind.down_proj", None),
        ("model.layers.11.mlp.experts.0.up_proj", None),
        ("model.layers.1.mlp", None),
        ("experts", None),
    ],
)
def test_a_name_applies_to_the_modules_inside_of_it(module: str, expected: LayerQuantConfig | None) -> None:
    """All routed experts of a layer are named once; names are compared by whole parts, not as strings."""
    name = "model.layers.1.mlp.experts"
    everything = QuantConfig(layer=FP8, exclude_modules=(name,))

    assert QuantConfig(quantized_layers={name: FP8}).layer_config(module) == expected
    assert everything.layer_config(module) == (None if expected else FP8)


def test_an_excluded_module_inside_of_a_named_one_is_plain() -> None:
    config = QuantConfig(quantized_layers={"a": FP8}, exclude_modules=("a.b",))

    assert [config.layer_config(name) for name in ("a", "a.b", "a.b.c", "a.c")] == [FP8, None, None, FP8]


@pytest.mark.parametrize(
    ("entry", "layer"),
    [
        (
            # nvidia-modelopt 0.47.0, INT4_AWQ_CFG
            {
                "quant_algo": "W4A16_AWQ",
                "kv_cache_quant_algo": None,
                "group_size": 128,
                "has_zero_point": False,
                "pre_quant_scale": True,
                "exclude_modules": ["lm_head", "model.embed_tokens"],
            },
            AWQ,
        ),
        (
            # nvidia-modelopt 0.47.0, NVFP4_DEFAULT_CFG
            {
                "quant_algo": "NVFP4",
                "kv_cache_quant_algo": None,
                "group_size": 16,
                "exclude_modules": ["lm_head", "model.embed_tokens"],
            },
            LayerQuantConfig(quant_algo=QuantAlgo.NVFP4, group_size=16),
        ),
        (
            # nvidia-modelopt 0.47.0, FP8_DEFAULT_CFG
            {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head", "model.embed_tokens"]},
            FP8,
        ),
    ],
)
def test_entries_of_modelopt_are_read_and_written_unchanged(entry: dict[str, object], layer: LayerQuantConfig) -> None:
    config = QuantConfig.from_dict(entry)

    assert config == QuantConfig(layer=layer, exclude_modules=("lm_head", "model.embed_tokens"))
    assert config.to_dict() == entry


@pytest.mark.parametrize("name", ["fp8_pb_wo", "FP8_PB_WO"])
def test_the_name_that_modelopt_has_for_fp8_in_blocks(name: str) -> None:
    """nvidia-modelopt 0.47.0, FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG."""
    layer = QuantConfig.from_dict({"quant_algo": name}).layer

    assert layer == LayerQuantConfig(quant_algo=QuantAlgo.FP8_BLOCK_SCALES)


@pytest.mark.parametrize("entry", [{}, {"quant_algo": None}, {"quant_algo": None, "exclude_modules": None}])
def test_an_entry_without_quantization_gives_an_empty_configuration(entry: dict[str, object]) -> None:
    assert QuantConfig.from_dict(entry) == QuantConfig()


@pytest.mark.parametrize(
    "entry",
    [{"quant_algo": "W3A16"}, {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "?"}}}],
)
def test_an_unknown_algorithm_is_refused(entry: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="is not a valid QuantAlgo"):
        QuantConfig.from_dict(entry)
