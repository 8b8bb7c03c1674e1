"""The double loads as strictly and as carelessly as the original: it silently corrupts weights in the same cases."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch
from engine_modules import experts, fp8, linear, load, nvfp4
from safetensors.torch import load_file, save_file
from torch import Tensor

import trtllm_ct
from trtllm_ct import convert_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TOKENS = list(range(5, 25))
LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, int4 with groups of 128, converted for stock TensorRT-LLM."""
    out = tmp_path_factory.mktemp("double") / "demo"
    convert_checkpoint(Path(trtllm_ct.__file__).parent / "cli" / "demo_data", out)
    return out


@pytest.fixture(params=engine_double.GENERATIONS)
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    with engine_double.installed(request.param) as module:
        yield module


@pytest.fixture
def newest() -> Iterator[Any]:
    with engine_double.installed("newest") as module:
        yield module


def logits_of(engine: Any, directory: Path, **arguments: Any) -> Tensor:
    with engine.LLM(model=directory, skip_tokenizer_init=True, **arguments) as llm:
        logits: Tensor = llm.logits(TOKENS)
    return logits


def edited(source: Path, out: Path, edit: Callable[[dict[str, Tensor]], object], **config: Any) -> Path:
    """Return a copy with changed tensors and changed values in config.json; None removes a key."""
    out.mkdir()
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, out / "model.safetensors")
    (out / "hf_quant_config.json").write_text((source / "hf_quant_config.json").read_text())
    settings = json.loads((source / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return out


@pytest.mark.reference
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 4), (2, 2)], ids=str)
def test_a_converted_directory_gives_the_logits_of_the_reference_engine(
    engine: Any, converted: Path, sizes: tuple[int, int]
) -> None:
    from trtllm_ct.reference import load_model

    model: Any = load_model(converted, dtype=torch.float32, quantize_activations=False)
    with torch.no_grad():
        want = model(torch.tensor([TOKENS])).logits[0]

    got = logits_of(engine, converted, tensor_parallel_size=sizes[0], pipeline_parallel_size=sizes[1])

    assert (got - want).abs().max() < 2e-3 * want.std()


def test_a_linear_without_tensors_is_skipped_and_stays_uninitialized(
    engine: Any, converted: Path, tmp_path: Path
) -> None:
    def misname(tensors: dict[str, Tensor]) -> None:
        for leaf in ("weight", "weight_scale", "pre_quant_scale"):
            tensors[f"{LAYER}.self_attn.out_proj.{leaf}"] = tensors.pop(f"{LAYER}.self_attn.o_proj.{leaf}")

    assert logits_of(engine, edited(converted, tmp_path / "out", misname)).isnan().all()


def test_a_fused_linear_without_a_member_is_an_error(engine: Any, converted: Path, tmp_path: Path) -> None:
    directory = edited(converted, tmp_path / "out", lambda tensors: tensors.pop(f"{LAYER}.mlp.up_proj.weight"))
    with pytest.raises(AssertionError, match="weight"):
        logits_of(engine, directory)


def test_unread_tensors_are_not_reported(engine: Any, converted: Path, tmp_path: Path) -> None:
    extra = edited(converted, tmp_path / "out", lambda tensors: tensors.update(stray=torch.ones(1)))
    assert torch.equal(logits_of(engine, extra), logits_of(engine, converted))


def test_more_ranks_than_kv_heads_break_scales_that_the_mapper_does_not_repeat(engine: Any, converted: Path) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        logits_of(engine, converted, tensor_parallel_size=4)


def test_old_releases_read_the_older_names_of_rotary_parameters_only(converted: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 500.0}
    directory = edited(converted, tmp_path / "out", dict, rope_parameters=rope, rope_theta=None)
    same = {}
    for generation in engine_double.GENERATIONS:
        with engine_double.installed(generation) as engine:
            same[generation] = torch.equal(logits_of(engine, directory), logits_of(engine, converted))
    assert same == {"old": True, "mid": True, "newest": False}


# One Linear at a time.


def test_row_scales_with_two_dimensions_are_flattened_by_newer_releases_only() -> None:
    weights = fp8(weight_scale=torch.full((64, 1), 0.5))
    with engine_double.installed("newest"):
        assert load(linear("FP8_PER_CHANNEL_PER_TOKEN"), weights).eq(128).all()
    for generation in ("old", "mid"):
        with engine_double.installed(generation), pytest.raises(RuntimeError, match="broadcast shape"):
            load(linear("FP8_PER_CHANNEL_PER_TOKEN"), weights)


def test_int8_codes_are_silently_cast_to_fp8(engine: Any) -> None:
    codes = torch.full((64, 256), 101, dtype=torch.int8)
    assert (
        load(linear("FP8_PER_CHANNEL_PER_TOKEN"), {"weight": codes, "weight_scale": torch.ones(64)}).eq(104 * 256).all()
    )


def test_a_single_scale_is_broadcast_to_all_rows(engine: Any) -> None:
    weights = {"weight": torch.ones(64, 256, dtype=torch.int8), "weight_scale": torch.tensor([2.0])}
    assert load(linear("W8A16"), weights).eq(512).all()


def test_shards_of_a_per_tensor_linear_are_requantized_to_the_larger_scale(engine: Any) -> None:
    module = linear("FP8", rows=128, fused="GATE_UP")
    output = load(module, fp8(weight_scale=1.0, input_scale=1.0), fp8(weight_scale=3.0, input_scale=2.0))
    assert float(module.weight_scale) == 3
    assert float(module.input_scale) == 2
    third = torch.tensor(1 / 3).bfloat16().to(torch.float8_e4m3fn).float()
    assert torch.equal(output[0, :64], (3 * third * 256).expand(64))


@pytest.mark.parametrize(("given", "poisoned"), [((True, True), False), ((False, False), False), ((True, False), True)])
def test_input_scales_of_only_some_shards_use_uninitialized_memory(
    engine: Any, given: tuple[bool, bool], poisoned: bool
) -> None:
    shards = [fp8(weight_scale=1.0, **({"input_scale": 1.0} if there else {})) for there in given]
    assert load(linear("FP8", rows=128, fused="GATE_UP"), *shards).isnan().all() == poisoned


def test_scalars_of_one_fused_nvfp4_linear_must_agree(engine: Any) -> None:
    with pytest.raises(AssertionError, match="weight_scale_2"):
        load(
            linear("NVFP4", rows=128, fused="GATE_UP"),
            nvfp4(weight_scale_2=1.0, input_scale=1.0),
            nvfp4(weight_scale_2=2.0, input_scale=1.0),
        )


def test_int4_rows_lie_in_pairs_low_nibble_first(engine: Any) -> None:
    """The worked example: row 0 is -8..-1, row 1 is 0..7, two's complement."""
    rows = torch.tensor([list(range(-8, 0)), list(range(8))]).repeat(8, 4)
    packed = ((rows[0::2] & 15) | (rows[1::2] & 15) << 4).to(torch.uint8)
    assert packed[0, :8].tolist() == [0x08, 0x19, 0x2A, 0x3B, 0x4C, 0x5D, 0x6E, 0x7F]
    module = linear("W4A16", rows=16, columns=32)
    load(module, {"weight": packed, "weight_scale": torch.ones(16)})
    assert torch.equal(module.quant_method.dequantize(module), rows.float())


@pytest.mark.parametrize("gptq", [False, True])
def test_zeros_are_added_where_the_release_has_a_method_for_them(gptq: bool) -> None:
    packed = torch.full((8, 256), 0x11, dtype=torch.uint8)
    grouped = {"weight_scale": torch.full((16, 2), 2.0), "weight_zero": torch.full((16, 2), -1.5)}
    with engine_double.installed("newest", gptq=gptq):
        if gptq:
            assert load(linear("W4A16_GPTQ", rows=16), {"weight": packed, **grouped}).eq(0.5 * 256).all()
        else:
            with pytest.raises(ValueError, match="unsupported quant mode"):
                linear("W4A16_GPTQ", rows=16)


def test_scales_of_the_kv_cache_are_taken_from_k_and_v(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [fp8(weight_scale=1.0, **more) for more in ({}, {"k_scale": 2.0}, {"v_scale": 3.0})]
    found = {}
    for generation, setting in product(engine_double.GENERATIONS, (None, "0", "1")):
        if setting is None:
            monkeypatch.delenv("TRTLLM_LOAD_KV_SCALES", raising=False)
        else:
            monkeypatch.setenv("TRTLLM_LOAD_KV_SCALES", setting)
        with engine_double.installed(generation):
            load(module := linear("FP8", rows=192, fused="QKV"), *shards)
            found[generation, setting] = module.kv_scales.tolist()
    unread, read, times_six = [1, 1, 1], [1, 2, 3], [1, 12, 18]
    assert found == {
        ("old", None): unread,
        ("old", "0"): unread,
        ("old", "1"): times_six,
        ("mid", None): read,
        ("mid", "0"): unread,
        ("mid", "1"): read,
        ("newest", None): read,
        ("newest", "0"): unread,
        ("newest", "1"): read,
    }


def test_blocks_are_spread_as_evenly_as_they_go(newest: Any) -> None:
    from tensorrt_llm._torch.modules.sharding import bounds

    assert [bounds(1280, 128, 4, rank) for rank in range(4)] == [(0, 384), (384, 768), (768, 1024), (1024, 1280)]
    with pytest.raises(AssertionError, match="alignment"):
        bounds(1280, 96, 4, 0)


@pytest.mark.parametrize(("generation", "widths"), [("newest", [2, 2, 1]), ("mid", None), ("old", None)])
def test_only_newer_releases_allow_uneven_slices(generation: str, widths: list[int] | None) -> None:
    from contextlib import nullcontext

    with engine_double.installed(generation):
        refused = nullcontext() if widths else pytest.raises(AssertionError, match="divisible by tp_size")
        with refused:
            parts = [
                linear("FP8_BLOCK_SCALES", columns=640, size=3, rank=rank, tensor_parallel_mode="row")
                for rank in range(3)
            ]
            assert [part.in_features // 128 for part in parts] == widths


def test_k_and_v_of_row_scales_are_not_repeated_for_more_ranks_than_heads(engine: Any) -> None:
    from types import SimpleNamespace

    from tensorrt_llm._torch.models.checkpoints.hf.weight_mapper import HfWeightMapper
    from tensorrt_llm.mapping import Mapping

    config = SimpleNamespace(num_key_value_heads=2, tie_word_embeddings=False)
    model_config = SimpleNamespace(mapping=Mapping(world_size=4, tp_size=4))
    mapper = HfWeightMapper()
    mapper.init_model_and_config(SimpleNamespace(model_config=model_config, config=config), model_config)  # type: ignore[arg-type]
    shapes = {}
    for algo in ("FP8_PER_CHANNEL_PER_TOKEN", "NVFP4"):
        keys = {"weight": torch.arange(4.0)[:, None], "bias": torch.arange(4.0), "weight_scale": torch.ones(4, 1)}
        weights = {
            f"self_attn.{part}.{key}": value for part in ("q_proj", "k_proj", "v_proj") for key, value in keys.items()
        }
        repeated = mapper.apply_callbacks(linear(algo, fused="QKV"), "qkv_proj", ["self_attn"], weights)[1]
        assert repeated["weight"].flatten().tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
        assert repeated["bias"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        shapes[algo] = tuple(repeated["weight_scale"].shape)
    assert shapes == {"FP8_PER_CHANNEL_PER_TOKEN": (4, 1), "NVFP4": (8, 1)}


# Experts.


def expert_weights(**companions: Callable[[int, int], Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for expert in range(4):
        for part, rows, columns in (("w1", 128, 256), ("w3", 128, 256), ("w2", 256, 128)):
            values = torch.randn(rows, columns, generator=generator) / 8
            weights[f"{expert}.{part}.weight"] = values.to(torch.float8_e4m3fn)
            weights |= {f"{expert}.{part}.{name}": make(rows, columns) for name, make in companions.items()}
    return weights


@pytest.mark.parametrize("parts", [{"moe_ep_size": 2}, {"moe_ep_size": 1}], ids=["experts", "tensors"])
def test_ranks_of_experts_add_up(newest: Any, monkeypatch: pytest.MonkeyPatch, parts: dict[str, int]) -> None:
    from tensorrt_llm._torch.modules.fused_moe import interface

    monkeypatch.setattr(interface, "allreduce", lambda value, group: value)
    weights = expert_weights(weight_scale=lambda n, k: torch.tensor(0.5), input_scale=lambda n, k: torch.tensor(1.0))
    hidden, router = torch.randn(5, 256), torch.randn(5, 4)
    results = []
    for ranks in (experts("FP8"), experts("FP8", 2, **parts)):
        for rank in ranks:
            rank.load_weights([weights])
        results.append(sum(rank(hidden, router) for rank in ranks))
    assert torch.allclose(*results, rtol=1e-4, atol=1e-5)


def test_experts_have_no_row_wise_fp8(engine: Any) -> None:
    with pytest.raises(ValueError, match="Unsupported quantization mode"):
        experts("FP8_PER_CHANNEL_PER_TOKEN")


def test_weight_only_int4_experts_lack_required_tensors(engine: Any) -> None:
    packed = {
        f"{expert}.{part}.{leaf}": tensor
        for expert in range(4)
        for part, rows, columns in (("w1", 128, 256), ("w3", 128, 256), ("w2", 256, 128))
        for leaf, tensor in {
            "weight": torch.zeros(rows // 2, columns, dtype=torch.uint8),
            "weight_scale": torch.ones(rows, columns // 128),
        }.items()
    }
    # The oldest release looks for scales under another name first.
    with pytest.raises(KeyError, match=r"input_scale|weight_scale_inv"):
        experts("W4A16_AWQ")[0].load_weights([packed])


@pytest.mark.parametrize(
    ("algo", "companion", "missing"),
    [("FP8", "weight_scale", "input_scale"), ("FP8_BLOCK_SCALES", "weight_scale", "weight_scale_inv")],
)
def test_experts_name_missing_tensors(engine: Any, algo: str, companion: str, missing: str) -> None:
    weights = expert_weights(**{companion: lambda n, k: torch.ones(-(-n // 128), -(-k // 128))})
    with pytest.raises(KeyError, match=missing):
        experts(algo)[0].load_weights([weights])
