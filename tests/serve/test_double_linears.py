"""Linears of the double: what each generation computes, asserts and drops, as the engine of that time does."""

from __future__ import annotations

from typing import Any

import engine_double
import pytest
import torch
from engine_modules import fp8, int4, int8, linear, load, nvfp4
from torch import Tensor

OLD, MID, NEWEST = engine_double.GENERATIONS
WEIGHT_ONLY = {"W8A16": int8, "W4A16": int4}
BIAS = 3.0


def with_bias(module: Any, weights: dict[str, Tensor]) -> float:
    """Load a Linear with a bias of 3 and a weight of ones, and return one element of its output for 256 ones."""
    return float(load(module, weights | {"bias": torch.full((64,), BIAS)})[0, 0])


# Biases.


@pytest.mark.parametrize("algo", WEIGHT_ONLY)
@pytest.mark.parametrize(("generation", "added"), [(OLD, 0), (MID, 0), (NEWEST, BIAS)])
def test_weight_only_linears_dropped_their_bias(algo: str, generation: str, added: float) -> None:
    """PR #12317, merged 2026-03-18."""
    with engine_double.installed(generation):
        assert with_bias(linear(algo, bias=True), WEIGHT_ONLY[algo]()) == 256 + added


@pytest.mark.parametrize("algo", ["FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES", "NVFP4", "W4A16_AWQ"])
def test_all_other_linears_add_their_bias(engine: Any, algo: str) -> None:
    weights = {
        "FP8": fp8(weight_scale=1.0),
        "FP8_PER_CHANNEL_PER_TOKEN": fp8(weight_scale=torch.ones(64)),
        "FP8_BLOCK_SCALES": fp8(weight_scale=torch.ones(1, 2)),
        "NVFP4": nvfp4(weight_scale_2=1.0, input_scale=1.0),
        "W4A16_AWQ": int4(group=128, pre_quant_scale=torch.ones(256)),
    }
    assert with_bias(linear(algo, bias=True), weights[algo]) == 256 + BIAS


def grouped(sm: int, generation: str) -> float:
    with engine_double.installed(generation, sm=sm):
        return with_bias(linear("W4A16_AWQ", bias=True), int4(group=128, pre_quant_scale=torch.ones(256)))


@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
@pytest.mark.parametrize("sm", [80, 89, 90])
def test_the_grouped_gemm_adds_the_bias_before_sm100(generation: str, sm: int) -> None:
    assert grouped(sm, generation) == 256 + BIAS


@pytest.mark.parametrize("sm", [100, 103])
def test_the_grouped_gemm_dropped_the_bias_on_sm100(sm: int) -> None:
    """PR #12190, merged 2026-03-13; the first releases have no such kernel."""
    assert grouped(sm, MID) == 256
    assert grouped(sm, NEWEST) == 256 + BIAS
    with pytest.raises(ValueError, match=f"less than or equal to 90, got {sm}"):
        grouped(sm, OLD)


@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
@pytest.mark.parametrize("sm", [120, 121])
def test_no_release_has_the_grouped_gemm_for_sm120(generation: str, sm: int) -> None:
    with pytest.raises(ValueError, match=f"SM version must be less than or equal to .*, got {sm}"):
        grouped(sm, generation)


@pytest.mark.parametrize("algo", WEIGHT_ONLY)
def test_weight_only_linears_run_on_sm100_since_2026(algo: str) -> None:
    """PR #10190."""
    for generation in (MID, NEWEST):
        with engine_double.installed(generation, sm=100):
            assert load(linear(algo), WEIGHT_ONLY[algo]()).eq(256).all()
    with engine_double.installed(OLD, sm=100), pytest.raises(RuntimeError, match="SM100"):
        load(linear(algo), WEIGHT_ONLY[algo]())


@pytest.mark.parametrize(("sm", "stored"), [(90, 0x99), (100, 0x11), (103, 0x11), (120, 0x99)])
def test_codes_become_offset_binary_except_on_sm100(sm: int, stored: int) -> None:
    with engine_double.installed(sm=sm):
        load(module := linear("W4A16"), int4())
        assert module.weight.view(torch.uint8).eq(stored).all()


# Scalars of NVFP4.


def fused_nvfp4(name: str, difference: float, **more: Any) -> Tensor:
    scalars = {"weight_scale_2": 1.0, "input_scale": 1.0}
    module = linear("NVFP4", rows=128, fused="GATE_UP", **more)
    return load(module, nvfp4(**scalars), nvfp4(**(scalars | {name: 1 + difference})))


@pytest.mark.parametrize("name", ["weight_scale_2", "input_scale"])
def test_scalars_must_be_equal_bit_by_bit_before_they_may_differ_a_little(name: str) -> None:
    """1.2e-7 is one unit in the last place of float32."""
    for generation in (OLD, MID):
        with engine_double.installed(generation):
            assert fused_nvfp4(name, 0).eq(256).all()
            with pytest.raises(AssertionError, match=f"The {name} should be same"):
                fused_nvfp4(name, 1.2e-7)
    with engine_double.installed(NEWEST):
        assert fused_nvfp4(name, 1e-6).isfinite().all()
        with pytest.raises(AssertionError, match=f"The {name} should be same"):
            fused_nvfp4(name, 1e-3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_missing_input_scale_raises_in_older_releases(dynamic: bool) -> None:
    for generation in (OLD, MID):
        with engine_double.installed(generation), pytest.raises(AttributeError, match="'float'"):
            load(linear("NVFP4", force_dynamic_quantization=dynamic), nvfp4(weight_scale_2=1.0))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_missing_input_scale_is_uninitialized_in_newer_releases_unless_dynamic(dynamic: bool) -> None:
    with engine_double.installed(NEWEST):
        output = load(linear("NVFP4", force_dynamic_quantization=dynamic), nvfp4(weight_scale_2=1.0))
    assert output.eq(256).all() if dynamic else output.isnan().all()


@pytest.mark.parametrize("algo", ["FP8", "NVFP4"])
def test_a_k_scale_without_a_v_scale_raises_since_2026(algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTLLM_LOAD_KV_SCALES", "1")
    one = fp8(weight_scale=1.0) if algo == "FP8" else nvfp4(weight_scale_2=1.0, input_scale=1.0)
    shards = [one, one | {"k_scale": torch.tensor(2.0)}, one]
    for generation in (MID, NEWEST):
        with engine_double.installed(generation), pytest.raises(AssertionError, match="loaded together"):
            load(linear(algo, rows=192, fused="QKV"), *shards)
    with engine_double.installed(OLD):
        load(module := linear(algo, rows=192, fused="QKV"), *shards)
        assert module.kv_scales.tolist() == [1, 12, 1]


# Dynamic activations.


def test_static_scales_are_not_used_where_activations_are_dynamic(engine: Any) -> None:
    """The stored scale of zero would make every value NaN."""
    weights = fp8(weight_scale=1.0, input_scale=0.0)
    assert load(linear("FP8", force_dynamic_quantization=True), weights).eq(256).all()
    assert load(linear("FP8"), weights).isnan().all()


# Slices.


def rank_of(algo: str, rank: int, size: int, mode: str, **more: Any) -> Any:
    """A Linear as decoders have it: it allocates when its configuration is settled."""
    module = linear(
        algo,
        rank=rank,
        size=size,
        tensor_parallel_mode=mode,
        skip_create_weights_in_init=True,
        reduce_output=False,
        **more,
    )
    module.create_weights()
    return module


@pytest.mark.parametrize("algo", ["FP8_BLOCK_SCALES", "W4A16_AWQ", "FP8"])
@pytest.mark.parametrize("mode", ["row", "column"])
def test_linears_of_decoders_need_features_that_divide(engine: Any, algo: str, mode: str) -> None:
    """`modeling_auto.py` sets `skip_create_weights_in_init`, so that the newest release has no `tp_sharding`."""
    with pytest.raises(AssertionError, match="640 features must be divisible by tp_size 3"):
        rank_of(algo, 0, 3, mode, rows=640, columns=640)


def test_linears_of_decoders_cut_each_tensor_by_its_own_width(engine: Any) -> None:
    """Of three blocks of columns, each rank holds one and a half; rank 0 gets two scales, and rank 1 one."""
    scale = torch.tensor([[1.0, 2.0, 4.0]])
    weights = fp8(rows=64, columns=384, weight_scale=scale)
    first = rank_of("FP8_BLOCK_SCALES", 0, 2, "row", rows=64, columns=384)
    load(first, weights)
    assert first.weight_scale.tolist() == [[1, 2]]
    second = rank_of("FP8_BLOCK_SCALES", 1, 2, "row", rows=64, columns=384)
    load(second, weights)
    # The one scale is copied into both places, so half a block of columns is read with its neighbour's scale.
    assert second.weight_scale.tolist() == [[4, 4]]


@pytest.mark.parametrize(("generation", "widths"), [(OLD, [2, 2, 1]), (MID, [2, 2, 1]), (NEWEST, [2, 2, 1])])
def test_remainders_of_five_on_three_ranks(generation: str, widths: list[int]) -> None:
    assert own_widths(generation, 5, 3) == widths


@pytest.mark.parametrize(("generation", "widths"), [(OLD, [3, 3, 3, 0]), (MID, [3, 3, 3, 0]), (NEWEST, [3, 2, 2, 2])])
def test_remainders_are_spread_in_newer_releases_only(generation: str, widths: list[int]) -> None:
    """`load_weight_shard` divides with ceiling, `_calc_shard` spreads the remainder."""
    assert own_widths(generation, 9, 4) == widths


def own_widths(generation: str, width: int, size: int) -> list[int]:
    with engine_double.installed(generation):
        from tensorrt_llm._torch.modules.sharding import cut_shard

        ranks = [rank_of("FP8", rank, size, "column", rows=64 * size, fused="GATE_UP") for rank in range(size)]
        return [cut_shard(rank, torch.ones(width, 2), (1, 1)).shape[0] for rank in ranks]


def test_scales_of_partial_blocks_are_written_over_each_other(engine: Any) -> None:
    """K has 64 rows, so its scale lies in block row 1 and V's in row 2, which doesn't exist: nothing is written."""
    parts = [(128, 1.0), (64, 2.0), (64, 4.0)]
    shards = [fp8(rows, 128, weight_scale=torch.full((1, 1), scale)) for rows, scale in parts]
    module = linear("FP8_BLOCK_SCALES", rows=256, columns=128, fused="QKV")
    output = load(module, *shards)[0] / 128
    assert module.weight_scale.tolist() == [[1], [2]]
    assert [output[row].item() for row in (0, 128, 192)] == [1, 2, 2]
