"""What a weight's mode depends on besides the weight: the release, the SM of the GPUs, and a bias of its Linear."""

from __future__ import annotations

from dataclasses import replace

import pytest
from quantized_weights import (
    FP8_CHANNEL,
    FP8_GROUP,
    FP8_STATIC,
    FP8_TENSOR,
    FP8_TOKEN,
    MXFP4,
    MXFP4_INPUT,
    MXFP8,
    MXFP8_INPUT,
    NVFP4,
    NVFP4_INPUT,
    blocks,
    ints,
    weight,
)

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import UsageError
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.holdings import Weight, holdings, obstacles
from trtllm_ct.engine.modes import LINEAR_MODES, MODES_BY_ALGO
from trtllm_ct.engine.platform import SMS, Platform, sm_of_capability, sms_in_words
from trtllm_ct.engine.releases import RELEASES, STOCK_1_0, STOCK_1_2, STOCK_1_3, Release
from trtllm_ct.engine.target import ENGINES, target_named

INT8, INT4_ROWS, INT4_GROUPS = weight(ints(8)), weight(ints(4)), weight(ints(4, 128))
BLOCKS = weight(blocks(), FP8_GROUP)
NVFP4_A16, MXFP8_A8 = weight(NVFP4), weight(MXFP8, MXFP8_INPUT)
W4AFP8_EXPERT = weight(ints(4, 128), FP8_STATIC, shape=(256, 256), expert=True)


def algos(of: Weight, release: Release = STOCK_1_2, sm: int | None = None) -> set[str]:
    """The stock modes of a release that hold a weight."""
    capabilities = ENGINES[release.name]
    known = capabilities.experts if of.expert else capabilities.linear
    return {str(held.mode.algo) for held in holdings(of, Platform(release=release, sm=sm)) if held.mode.algo in known}


# Biases.


@pytest.mark.parametrize("sm", [None, *SMS])
@pytest.mark.parametrize("release", [STOCK_1_0, STOCK_1_2], ids=lambda release: release.name)
@pytest.mark.parametrize(("of", "algo"), [(INT8, "W8A16"), (INT4_ROWS, "W4A16")], ids=["int8", "int4"])
def test_a_mode_that_drops_the_bias_holds_only_linears_without_one(of, algo, release, sm):
    """`WeightOnlyQuantLinearMethod.apply` returned the product without the bias."""
    assert algo in algos(of, release, sm) or (release, sm) == (STOCK_1_0, 100)
    assert algo not in algos(replace(of, bias=True), release, sm)


@pytest.mark.parametrize("of", [INT8, INT4_ROWS], ids=["int8", "int4"])
def test_the_newest_release_adds_every_bias(of):
    assert algos(of, STOCK_1_3) == algos(replace(of, bias=True), STOCK_1_3)


def test_int4_rows_with_a_bias_are_held_in_groups():
    assert algos(replace(INT4_ROWS, bias=True)) == {"W4A16_AWQ"}


def test_experts_have_no_bias_that_could_be_dropped():
    assert algos(replace(INT8, bias=True, expert=True)) == {"W8A16"}


@pytest.mark.parametrize(
    ("release", "sm", "held"),
    [
        (STOCK_1_2, 100, False),
        (STOCK_1_2, 90, True),
        (STOCK_1_2, None, True),
        (STOCK_1_3, 100, True),
        (STOCK_1_0, 89, True),
    ],
)
def test_groups_with_a_bias_on_sm100_wait_for_the_release_that_adds_it(release, sm, held):
    biased = replace(INT4_GROUPS, bias=True)
    assert ("W4A16_AWQ" in algos(biased, release, sm)) is held


def test_the_reason_names_release_gpu_and_the_release_with_the_fix():
    biased = replace(INT4_GROUPS, bias=True)
    at = Platform(release=STOCK_1_2, sm=100)
    assert obstacles(biased, frozenset({QuantAlgo.W4A16_AWQ}), at) == (
        "W4A16_AWQ of stock-1.2 drops the bias on SM100; stock-1.3 adds it",
    )
    assert obstacles(replace(INT8, bias=True), frozenset({QuantAlgo.W8A16}), replace(at, sm=None)) == (
        "W8A16 of stock-1.2 drops the bias; stock-1.3 adds it",
    )


# SMs.


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_int4_in_groups_is_not_planned_for_sm120(release, zeros):
    """The GEMM raises ValueError there."""
    held = holdings(replace(INT4_GROUPS, has_zero_point=zeros), Platform(release=release, sm=120))
    assert held == ()


@pytest.mark.parametrize(
    ("of", "release", "sm", "expected"),
    [
        (INT4_GROUPS, STOCK_1_0, 100, set()),
        (INT4_GROUPS, STOCK_1_2, 100, {"W4A16_AWQ"}),
        (INT4_ROWS, STOCK_1_2, 120, {"W4A16"}),
        (INT8, STOCK_1_0, 100, set()),
        (INT8, STOCK_1_2, 100, {"W8A16"}),
        (weight(NVFP4, NVFP4_INPUT), STOCK_1_2, 90, set()),
        (weight(NVFP4, NVFP4_INPUT), STOCK_1_2, 120, {"NVFP4"}),
        (weight(NVFP4, NVFP4_INPUT), STOCK_1_2, None, {"NVFP4"}),
        (weight(MXFP4, MXFP4_INPUT), STOCK_1_2, 100, {"W4A8_MXFP4_MXFP8"}),
        (weight(MXFP4), STOCK_1_3, 100, {"W4A8_MXFP4_MXFP8"}),
        (weight(MXFP4), STOCK_1_0, 100, set()),
        (weight(MXFP4), STOCK_1_2, None, set()),
        (weight(MXFP4), STOCK_1_2, 90, set()),
        (weight(MXFP4), STOCK_1_2, 120, set()),
        (weight(MXFP4, expert=True), STOCK_1_2, 90, {"W4A16_MXFP4"}),
        (weight(MXFP4, expert=True), STOCK_1_2, 100, {"W4A8_MXFP4_MXFP8"}),
        (weight(MXFP4, expert=True), STOCK_1_2, 120, {"W4A8_MXFP4_MXFP8"}),
        (weight(MXFP4, expert=True), STOCK_1_2, 89, set()),
        (weight(MXFP4, expert=True), STOCK_1_2, None, set()),
        (replace(NVFP4_A16, shape=(32, 48)), STOCK_1_3, 90, {"W4A16_NVFP4"}),
        *((replace(NVFP4_A16, shape=(32, 48)), STOCK_1_3, sm, set()) for sm in (None, 120)),
        (replace(NVFP4_A16, shape=(32, 64)), STOCK_1_3, 120, {"W4A16_NVFP4"}),
        *((replace(MXFP8_A8, shape=(48, 64)), STOCK_1_3, sm, set()) for sm in (None, 100)),
        (replace(MXFP8_A8, shape=(96, 64)), STOCK_1_3, 100, {"MXFP8"}),
        (W4AFP8_EXPERT, STOCK_1_0, 90, set()),
        *((W4AFP8_EXPERT, release, 90, {"W4A8_AWQ"}) for release in (STOCK_1_2, STOCK_1_3)),
        *((W4AFP8_EXPERT, STOCK_1_3, sm, set()) for sm in (None, 89, 100, 120)),
        (replace(W4AFP8_EXPERT, scale_dtype=DType.BF16), STOCK_1_2, 90, {"W4A8_AWQ"}),
        (replace(W4AFP8_EXPERT, scale_dtype=DType.F16), STOCK_1_2, 90, set()),
        (replace(W4AFP8_EXPERT, scale_dtype=DType.F32), STOCK_1_2, 90, set()),
        (replace(W4AFP8_EXPERT, has_zero_point=True), STOCK_1_2, 90, set()),
        *((replace(W4AFP8_EXPERT, shape=shape), STOCK_1_2, 90, set()) for shape in ((192, 256), (256, 192))),
        (replace(BLOCKS, expert=True), STOCK_1_2, 89, set()),
        (replace(BLOCKS, expert=True), STOCK_1_2, 90, {"FP8_BLOCK_SCALES"}),
    ],
)
def test_the_sm_decides_where_kernels_differ(of, release, sm, expected):
    assert algos(of, release, sm) == expected


@pytest.mark.parametrize(
    ("sm", "columns", "held"),
    [
        (89, 576, False),
        (90, 576, True),
        (100, 576, True),
        (120, 576, False),
        (None, 576, False),
        (89, 640, True),
        (None, 640, True),
        (90, 584, False),
    ],
)
def test_the_gemm_of_fp8_blocks_wants_whole_blocks_on_two_sms(sm, columns, held):
    of = replace(BLOCKS, shape=(256, columns))
    assert (algos(of, sm=sm) == {"FP8_BLOCK_SCALES"}) is held


@pytest.mark.parametrize(("shape", "held"), [((32, 32), True), ((16, 32), False), ((48, 32), False), ((32, 48), False)])
def test_the_gemm_of_mxfp4_wants_multiples_of_32(shape, held):
    assert bool(algos(weight(MXFP4, shape=shape), sm=100)) is held


def test_the_reason_names_the_sms_that_decide():
    of = replace(BLOCKS, shape=(256, 576))
    platform = Platform(release=STOCK_1_2)
    assert obstacles(of, frozenset({QuantAlgo.FP8_BLOCK_SCALES}), platform) == (
        "FP8_BLOCK_SCALES needs out % 16 == 0 and in % 16 == 0 and in % 128 == 0 on SM89 and SM120",
    )


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
@pytest.mark.parametrize("sm", SMS)
def test_what_is_planned_without_an_sm_runs_on_every_sm_or_stops_there(release, sm):
    """Of the modes that are planned anyway, none computes other numbers on some SM: it is missing there or exact."""
    unknown, known = Platform(release=release), Platform(release=release, sm=sm)
    weights = [INT8, INT4_GROUPS, BLOCKS, weight(FP8_TENSOR, FP8_STATIC), weight(FP8_CHANNEL, FP8_TOKEN)]
    for of in weights:
        missing = {held.key for held in holdings(of, unknown)} - {held.key for held in holdings(of, known)}
        assert all(MODES_BY_ALGO[algo].linear_on.get(sm, release) != release for algo, _ in missing)


def test_every_fact_about_an_sm_is_about_one_that_can_be_planned_for():
    for mode in LINEAR_MODES:
        named = (mode.linear_on, mode.experts_on, mode.column_multiple_on, mode.bias_on, mode.linear_dtypes_on)
        assert set().union(*named) <= set(SMS)


# Dtypes of the model.


@pytest.mark.parametrize("sm", [None, *SMS])
@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
@pytest.mark.parametrize("expert", [False, True], ids=["Linear", "expert"])
@pytest.mark.parametrize(("dtype", "held"), [(DType.BF16, True), (DType.F16, False), (DType.F32, False)])
def test_fp8_blocks_are_held_in_bfloat16_models_only(expert, release, sm, dtype, held):
    of = replace(BLOCKS, expert=expert, model_dtype=dtype)
    runs = bool(algos(replace(of, model_dtype=None), release, sm))
    assert (algos(of, release, sm) == {"FP8_BLOCK_SCALES"}) is (runs and held)


@pytest.mark.parametrize(("sm", "held"), [(None, False), (89, True), (90, True), (100, True), (120, False)])
def test_marlin_on_sm120_takes_bfloat16_only(sm, held):
    of = replace(NVFP4_A16, model_dtype=DType.F16)
    assert ("W4A16_NVFP4" in algos(of, STOCK_1_3, sm)) is held
    assert "W4A16_NVFP4" in algos(replace(of, model_dtype=DType.BF16), STOCK_1_3, sm)


def test_float16_takes_no_other_mode_away_and_float32_takes_all():
    for mode in LINEAR_MODES:
        for expert in (False, True):
            taken = mode.dtypes_on(90, expert=expert)
            assert taken == ({DType.BF16} if mode.algo is QuantAlgo.FP8_BLOCK_SCALES else {DType.BF16, DType.F16})


@pytest.mark.parametrize(
    ("of", "algo", "reason"),
    [
        (BLOCKS, QuantAlgo.FP8_BLOCK_SCALES, "FP8_BLOCK_SCALES takes bfloat16 activations only"),
        (NVFP4_A16, QuantAlgo.W4A16_NVFP4, "W4A16_NVFP4 takes bfloat16 activations only on SM120"),
    ],
    ids=["everywhere", "on one SM"],
)
def test_the_reason_names_the_dtypes_and_what_changes_the_models(of, algo, reason):
    of = replace(of, model_dtype=DType.F16)
    assert obstacles(of, frozenset({algo}), Platform(release=STOCK_1_3)) == (
        f"{reason}, and the model's dtype is float16 (--dtype bfloat16 changes it)",
    )


@pytest.mark.parametrize(
    ("capability", "sm"),
    [
        ((8, 9), 89),
        ((9, 0), 90),
        ((10, 0), 100),
        ((10, 3), 100),
        ((12, 0), 120),
        ((12, 1), 120),
        ((8, 0), None),
        ((8, 6), None),
        ((11, 0), None),
    ],
)
def test_the_sm_of_a_gpu(capability, sm):
    assert sm_of_capability(*capability) == sm


def test_an_unknown_sm_is_named_with_the_known_ones():
    with pytest.raises(UsageError, match="89 or 90 or 100 or 120"):
        target_named("modelopt", sm=80)


def test_sms_in_words():
    assert [sms_in_words(SMS[:count]) for count in (1, 2, 3)] == ["SM89", "SM89 and SM90", "SM89, SM90 and SM100"]
