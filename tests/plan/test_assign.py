"""Which mode each module gets: alone, in a fused group of equal or different schemes, as an expert, at every target."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
import torch
from builders import tiny_config, write_checkpoint
from hypothesis import given, settings
from on_tensors import stream_delivered
from quantized_weights import (
    FP8_CHANNEL,
    FP8_GROUP,
    FP8_STATIC,
    FP8_TENSOR,
    FP8_TOKEN,
    INT8_TOKEN,
    MXFP4,
    MXFP4_INPUT,
    MXFP6,
    MXFP8,
    MXFP8_INPUT,
    NVFP4,
    NVFP4_INPUT,
    blocks,
    ints,
    weight,
)

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Element, NumberType, QuantArgs, Strategy
from trtllm_ct.engine.holdings import Weight, activations_of
from trtllm_ct.engine.modes import LINEAR_MODES, Activations, LinearMode, ScaleForm
from trtllm_ct.engine.platform import SMS
from trtllm_ct.engine.target import DENSE, ENGINES, MODELOPT, REFERENCE, TARGETS, target_named
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.plan.assign import Assignment, Candidate, assign_modes
from trtllm_ct.plan.models.sites import Site
from trtllm_ct.reference import ReferenceLinear

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.engine.platform import Platform
    from trtllm_ct.engine.releases import Release
    from trtllm_ct.engine.target import Target

QKV = "model.layers.0.self_attn.qkv_proj"
EXPERTS = "model.layers.0.mlp.experts"
Q, K, V = (f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv")
ALONE = "model.layers.0.mlp.down_proj"
SHAPE = (128, 256)
STOCK = tuple(target_named("modelopt", engine) for engine in ENGINES)


def int4(
    group_size: int | None = 128, *, strategy: Strategy | None = None, zeros: bool = False, fused: bool = False
) -> Weight:
    args = ints(4, group_size, strategy, symmetric=not zeros)
    return weight(args, shape=SHAPE, has_zero_point=zeros, fused=fused)


INT8_CHANNEL = weight(ints(8), shape=SHAPE)
INT8_GROUP = weight(ints(8, 128), shape=SHAPE)
W8A8 = weight(ints(8), INT8_TOKEN, shape=SHAPE)
W8A8_TENSOR = weight(ints(8, None, Strategy.TENSOR), INT8_TOKEN, shape=SHAPE)
W4AFP8 = weight(ints(4, 128), FP8_TOKEN, shape=SHAPE)
W4AFP8_STATIC = weight(ints(4, 128), FP8_STATIC, shape=SHAPE)
STATIC_FP8 = weight(FP8_TENSOR, FP8_STATIC, shape=SHAPE)
ROWWISE_FP8 = weight(FP8_CHANNEL, FP8_TOKEN, shape=SHAPE)
FP8_WEIGHT_ONLY = weight(FP8_TENSOR, shape=SHAPE)
BLOCK_FP8 = weight(blocks(), FP8_GROUP, shape=SHAPE)
NVFP4_W4A4 = weight(NVFP4, NVFP4_INPUT, shape=SHAPE)
NVFP4_A16 = weight(NVFP4, shape=SHAPE)
MXFP4_A16 = weight(MXFP4, shape=SHAPE)
MXFP4_W4A4 = weight(MXFP4, MXFP4_INPUT, shape=SHAPE)
MXFP4_EXPERT = replace(MXFP4_A16, expert=True)
MXFP6_A8 = weight(MXFP6, MXFP8_INPUT, shape=SHAPE)
MXFP8_A8 = weight(MXFP8, MXFP8_INPUT, shape=SHAPE)


def site(module: str = ALONE, **more: object) -> Site:
    return Site(module=module, class_name="Linear", shape=SHAPE, **more)


def assigned(of: Weight, at: Site, target: Target) -> Assignment:
    return assign_modes({at.module: Candidate(site=at, weight=of)}, [at], target)[at.module]


def alone(of: Weight, *, target: Target = MODELOPT, plain: bool = False) -> Assignment:
    return assigned(of, site(plain=plain), target)


def members(weights: dict[str, Weight | None], sites: list[Site], target: Target) -> list[Assignment | None]:
    """Return the assignments of a fused group; None stands for a plain member, which gets no assignment."""
    candidates = {at.module: Candidate(site=at, weight=of) for at in sites if (of := weights[at.module]) is not None}
    result = assign_modes(candidates, sites, target)
    assert result.keys() == candidates.keys()
    return [result.get(at.module) for at in sites]


def fused(*weights: Weight | None, target: Target = MODELOPT) -> list[Assignment | None]:
    """The assignments of q, k and v."""
    names = dict(zip((Q, K, V), weights, strict=True))
    return members(names, [site(name, mode_group=QKV, fused=True) for name in names], target)


def experts(*weights: Weight | None, target: Target = MODELOPT) -> list[Assignment | None]:
    """The assignments of the Linears of a layer's routed experts."""
    names = {f"{EXPERTS}.{i}.up_proj": of for i, of in enumerate(weights)}
    return members(names, [site(name, mode_group=EXPERTS, expert=True) for name in names], target)


def mode(assignment: Assignment | None) -> str:
    assert assignment is not None
    if assignment.holding is None:
        return "dequantized"
    algo, size = assignment.holding.key
    return f"{algo} g{size}" if size else str(algo)


def label(value: object) -> str:
    return value.scheme.label() if isinstance(value, Weight) else str(getattr(value, "name", value))


class TestAlone:
    @pytest.mark.parametrize(
        ("of", "expected"),
        [
            (int4(128), "W4A16_AWQ g128"),
            (int4(64), "W4A16_AWQ g64"),
            (int4(None), "W4A16"),
            (int4(None, strategy=Strategy.TENSOR), "W4A16"),
            (INT8_CHANNEL, "W8A16"),
            (weight(ints(8, None, Strategy.TENSOR), shape=SHAPE), "W8A16"),
            (weight(ints(3, 128), shape=SHAPE), "W4A16_AWQ g128"),
            (weight(ints(6), shape=SHAPE), "W8A16"),
            (STATIC_FP8, "FP8"),
            (ROWWISE_FP8, "FP8_PER_CHANNEL_PER_TOKEN"),
            (weight(FP8_TENSOR, FP8_TOKEN, shape=SHAPE), "FP8_PER_CHANNEL_PER_TOKEN"),
            (BLOCK_FP8, "FP8_BLOCK_SCALES"),
            (NVFP4_W4A4, "NVFP4 g16"),
        ],
        ids=label,
    )
    @pytest.mark.parametrize("target", [*STOCK, REFERENCE], ids=lambda target: target.capabilities.name)
    def test_it_gets_the_mode_that_holds_the_weight_unchanged(self, of, expected, target):
        assignment = alone(of, target=target)

        assert mode(assignment) == expected
        assert assignment.reason == ""
        assert assignment.holding.note == ""

    @pytest.mark.parametrize(
        ("of", "expected", "note"),
        [
            (W8A8, "W8A16", "activations stay 16-bit; the scheme asks for int8 token dynamic"),
            (W8A8_TENSOR, "W8A16", "activations stay 16-bit; the scheme asks for int8 token dynamic"),
            (W4AFP8, "W4A16_AWQ g128", "activations stay 16-bit; the scheme asks for fp8 token dynamic"),
            (
                weight(FP8_CHANNEL, FP8_STATIC, shape=SHAPE),
                "FP8_PER_CHANNEL_PER_TOKEN",
                "activations are fp8 dynamic per token; the static input scale of the scheme is dropped",
            ),
        ],
        ids=label,
    )
    def test_exact_weights_with_other_activations_are_native_with_a_note(self, of, expected, note):
        assignment = alone(of)

        assert mode(assignment) == expected
        assert (assignment.reason, assignment.holding.note) == ("", note)

    @pytest.mark.parametrize(
        ("of", "reason"),
        [
            (int4(32), "W4A16_AWQ holds groups of 64 or 128"),
            (int4(96), "W4A16_AWQ holds groups of 64 or 128"),
            (int4(None, zeros=True), "W4A16 holds no zero points"),
            (replace(int4(128), permuted=True), "this weight has activation ordering"),
            (INT8_GROUP, "W8A16 holds no scale per group"),
            (FP8_WEIGHT_ONLY, "FP8 computes on fp8 static per tensor activations, and the scheme leaves them 16-bit"),
            (weight(blocks(64, 64), FP8_GROUP, shape=SHAPE), "FP8_BLOCK_SCALES holds blocks of 128x128"),
            (MXFP6_A8, "stock-1.2 has no Linear for fp6 group 32 weights"),
        ],
        ids=label,
    )
    def test_a_weight_that_no_mode_holds_is_dequantized_with_a_reason(self, of, reason):
        assignment = alone(of)

        assert mode(assignment) == "dequantized"
        assert reason in assignment.reason

    @pytest.mark.parametrize("target", [*STOCK, REFERENCE], ids=lambda target: target.capabilities.name)
    def test_large_groups_are_held_by_repeating_their_scales(self, target):
        assignment = alone(int4(256), target=target)

        assert (mode(assignment), assignment.reason) == ("W4A16_AWQ g128", "scales repeated for groups of 128")

    @pytest.mark.parametrize(
        ("engine", "expected", "reason"),
        [
            (
                "stock-1.2",
                "W4A16_AWQ g128",
                "scales repeated for groups of 128: W4A16 of stock-1.2 drops the bias; stock-1.3 adds it",
            ),
            ("stock-1.3", "W4A16", ""),
        ],
    )
    def test_int4_rows_with_a_bias_get_a_mode_that_adds_it(self, engine, expected, reason):
        assignment = alone(replace(int4(None), bias=True), target=target_named("modelopt", engine))

        assert (mode(assignment), assignment.reason) == (expected, reason)

    def test_int8_with_a_bias_is_dequantized_where_every_mode_drops_it(self):
        biased = replace(INT8_CHANNEL, bias=True)

        reason = "W8A16 of stock-1.2 drops the bias; stock-1.3 adds it"
        assert alone(biased) == Assignment(holding=None, reason=reason)
        assert mode(alone(biased, target=target_named("modelopt", "stock-1.3"))) == "W8A16"

    @pytest.mark.parametrize(
        ("of", "sm", "reason"),
        [
            (int4(128), 120, "W4A16_AWQ has no Linear on SM120"),
            (
                replace(BLOCK_FP8, shape=(128, 576)),
                None,
                (
                    "FP8_BLOCK_SCALES needs out % 16 == 0 and in % 16 == 0 and in % 128 == 0 on SM89 and SM120; "
                    "kept with --sm 90 or --sm 100"
                ),
            ),
            (replace(BLOCK_FP8, shape=(128, 576)), 89, "FP8_BLOCK_SCALES needs out % 16 == 0 and in % 128 == 0"),
            (MXFP4_A16, None, "W4A8_MXFP4_MXFP8 has a Linear on SM100 only; kept with --sm 100"),
            (MXFP4_A16, 90, "W4A8_MXFP4_MXFP8 has no Linear on SM90"),
        ],
        ids=label,
    )
    def test_the_reason_says_what_the_sm_decides(self, of, sm, reason):
        assert alone(of, target=target_named("modelopt", sm=sm)) == Assignment(holding=None, reason=reason)

    def test_asymmetric_int4_is_native_only_where_the_target_declares_the_method(self):
        of = int4(128, zeros=True)

        assert mode(alone(of, target=REFERENCE)) == "W4A16_GPTQ g128"
        for target in STOCK:
            reason = f"W4A16_GPTQ would hold it, and {target.capabilities.name} has no such Linear"
            assert alone(of, target=target) == Assignment(holding=None, reason=reason)

    @pytest.mark.parametrize("shape", [(24, 256), (128, 96)])
    @pytest.mark.parametrize("of", [int4(None), INT8_CHANNEL], ids=label)
    def test_sizes_that_the_kernel_asserts_are_dequantized(self, of, shape):
        assignment = alone(replace(of, shape=shape))

        assert mode(assignment) == "dequantized"
        assert "needs out % 16 == 0 and in % 64 == 0" in assignment.reason

    @pytest.mark.parametrize("target", [*STOCK, REFERENCE], ids=lambda target: target.capabilities.name)
    def test_modules_that_engines_read_plain_are_dequantized_at_every_target(self, target):
        """They are embeddings, lm_head, routers, and weights that a model splits when it loads them."""
        expected = Assignment(holding=None, reason="engines read this module plain")
        assert alone(int4(128), plain=True, target=target) == expected

    @pytest.mark.parametrize("plain", [False, True])
    def test_a_plain_target_dequantizes_everything(self, plain):
        assert alone(int4(128), target=DENSE, plain=plain).reason == "target dense holds plain weights only"


class TestEngines:
    """A newer set of capabilities that would hold a module is named in its reason."""

    @pytest.mark.parametrize(("of", "algo"), [(MXFP8_A8, "MXFP8"), (NVFP4_A16, "W4A16_NVFP4")], ids=label)
    @pytest.mark.parametrize("engine", ["stock-1.0", "stock-1.2"])
    def test_the_reason_names_the_engine_that_has_the_linear(self, of, algo, engine):
        expected = f"{engine} has no {algo} Linear; stock-1.3 has one"

        assert alone(of, target=target_named("modelopt", engine)) == Assignment(holding=None, reason=expected)

    @pytest.mark.parametrize(("of", "expected"), [(MXFP8_A8, "MXFP8 g32"), (NVFP4_A16, "W4A16_NVFP4 g16")], ids=label)
    def test_the_newest_engine_holds_it(self, of, expected):
        assert mode(alone(of, target=target_named("modelopt", "stock-1.3"))) == expected

    def test_the_default_is_the_newest_stable_line(self):
        assert target_named("modelopt") == target_named("modelopt", "stock-1.2") == MODELOPT == TARGETS["modelopt"]
        assert MODELOPT.capabilities.name == "stock-1.2"

    def test_newer_engines_have_all_modes_of_older_ones(self):
        """What a release holds, later ones hold: a reason never names an older one."""
        for older, newer in pairwise(ENGINES.values()):
            assert older.linear <= newer.linear
            assert older.experts <= newer.experts
            assert older.kv_cache <= newer.kv_cache


class TestFused:
    @pytest.mark.parametrize(
        "of",
        [int4(128), int4(None), INT8_CHANNEL, W8A8, STATIC_FP8, ROWWISE_FP8, BLOCK_FP8, NVFP4_W4A4, FP8_WEIGHT_ONLY],
        ids=label,
    )
    def test_equal_members_keep_their_mode(self, of):
        assert set(fused(of, of, of)) == {alone(of)}

    def test_channel_scales_are_repeated_for_a_group_with_group_scales(self):
        q, k, v = fused(int4(128), int4(None), int4(128))

        assert [mode(q), mode(k), mode(v)] == ["W4A16_AWQ g128"] * 3
        assert [q.reason, k.reason, v.reason] == ["", "scales repeated so that qkv_proj has one mode", ""]

    @pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
    def test_groups_of_128_and_64_get_the_mode_with_groups_of_64(self, order):
        weights = [int4(128), int4(64), int4(128)]

        result = fused(*(weights[i] for i in order))

        assert {mode(assignment) for assignment in result} == {"W4A16_AWQ g64"}

    def test_tensor_and_channel_scales_get_a_mode_with_row_scales(self):
        q, k, v = fused(int4(None, strategy=Strategy.TENSOR), int4(None), int4(None))

        assert [mode(q), mode(k), mode(v)] == ["W4A16"] * 3

    def test_fp8_per_tensor_and_per_channel_get_row_scales_if_activations_are_equal(self):
        result = fused(weight(FP8_TENSOR, FP8_TOKEN, shape=SHAPE), ROWWISE_FP8, ROWWISE_FP8)

        assert [mode(assignment) for assignment in result] == ["FP8_PER_CHANNEL_PER_TOKEN"] * 3

    def test_members_without_a_common_mode_are_dequantized_and_the_reason_names_all_schemes(self):
        result = fused(ROWWISE_FP8, int4(128), int4(128))

        reason = (
            "qkv_proj has one mode for all its parts, and their schemes have no mode in common "
            "(fp8 channel, input fp8 token dynamic; int4 group 128)"
        )
        assert result == [Assignment(holding=None, reason=reason)] * 3

    def test_zero_points_in_one_member_dequantize_the_group_if_the_target_has_no_zero_points(self):
        q, k, v = fused(int4(128), int4(128, zeros=True), int4(128))

        assert [mode(q), mode(k), mode(v)] == ["dequantized"] * 3
        assert "their schemes have no mode in common" in q.reason
        assert k.reason == "W4A16_GPTQ would hold it, and stock-1.2 has no such Linear"

    def test_zero_points_in_one_member_give_all_members_a_mode_with_zero_points(self):
        q, k, v = fused(int4(128), int4(128, zeros=True), int4(128), target=REFERENCE)

        assert [mode(q), mode(k), mode(v)] == ["W4A16_GPTQ g128"] * 3

    def test_a_plain_member_makes_the_whole_group_plain(self):
        q, k, v = fused(int4(128), None, INT8_GROUP)

        assert k is None
        assert q.reason == "qkv_proj has one mode for all its parts, and k_proj is stored plain"
        assert v.reason == "W8A16 holds no scale per group"

    def test_no_gpu_keeps_members_that_engines_read_plain(self):
        """The weights would be held on SM90 and SM100."""
        of = replace(weight(blocks(), FP8_GROUP), shape=(256, 576))
        kept = members(dict.fromkeys((Q, K), of), [site(name, mode_group=QKV) for name in (Q, K)], MODELOPT)
        plain = members(
            dict.fromkeys((Q, K), of), [site(name, mode_group=QKV, plain=True) for name in (Q, K)], MODELOPT
        )

        assert all(assignment.reason.endswith("; kept with --sm 90 or --sm 100") for assignment in kept)
        assert [assignment.reason for assignment in plain] == ["engines read this module plain"] * 2

    def test_a_plain_group_gets_no_assignments(self):
        assert fused(None, None, None) == [None, None, None]


class TestExperts:
    """Routed experts have other kernels than Linears, and all experts of a layer share one mode."""

    @pytest.mark.parametrize(
        ("of", "expected"),
        [
            (INT8_CHANNEL, "W8A16"),
            (W8A8, "W8A16"),
            (STATIC_FP8, "FP8"),
            (BLOCK_FP8, "FP8_BLOCK_SCALES"),
            (NVFP4_W4A4, "NVFP4 g16"),
        ],
        ids=label,
    )
    @pytest.mark.parametrize("target", [*STOCK, REFERENCE], ids=lambda target: target.capabilities.name)
    def test_experts_get_the_modes_that_expert_kernels_have(self, of, expected, target):
        assert [mode(assignment) for assignment in experts(of, of, target=target)] == [expected] * 2

    @pytest.mark.parametrize(
        ("of", "reason"),
        [
            (int4(128), "W4A16_AWQ or W4A16_GPTQ would hold it, and {} has no such expert kernel"),
            (int4(None), "W4A16 would hold it, and {} has no such expert kernel"),
            (ROWWISE_FP8, "FP8_PER_CHANNEL_PER_TOKEN would hold it, and {} has no such expert kernel"),
        ],
        ids=label,
    )
    @pytest.mark.parametrize("target", [*STOCK, REFERENCE], ids=lambda target: target.capabilities.name)
    def test_int4_and_row_wise_fp8_experts_are_dequantized(self, of, reason, target):
        expected = Assignment(holding=None, reason=reason.format(target.capabilities.name))

        assert experts(of, of, target=target) == [expected] * 2

    @pytest.mark.parametrize(
        ("engine", "of", "reason"),
        [
            ("stock-1.0", int4(32), "stock-1.0 has no expert kernel for int4 group 32 weights"),
            (
                "stock-1.2",
                int4(32),
                "stock-1.2 has no expert kernel for int4 group 32 weights",
            ),
            (
                "stock-1.2",
                W4AFP8_STATIC,
                "W4A8_AWQ has an expert kernel that does not round weights on SM90 only; kept with --sm 90",
            ),
            (
                "stock-1.2",
                replace(W4AFP8_STATIC, scale_dtype=DType.F16),
                "W4A8_AWQ rounds scales to bfloat16, and these are float16",
            ),
        ],
        ids=["no mode", "activations", "SM", "scales"],
    )
    def test_the_reason_is_why_the_mode_of_int4_experts_does_not_hold_them(self, engine, of, reason):
        (assignment,) = experts(replace(of, expert=True), target=target_named("modelopt", engine=engine))

        assert reason in assignment.reason

    @pytest.mark.parametrize(
        ("sm", "reason"),
        [
            (89, "W4A8_AWQ has an expert kernel that rounds weights to fp8 on SM89"),
            (100, "W4A8_AWQ has no expert kernel on SM100"),
        ],
    )
    def test_int4_experts_with_static_activations_are_kept_where_the_kernel_rounds_nothing(self, sm, reason):
        of = replace(W4AFP8_STATIC, expert=True)
        (elsewhere,) = experts(of, target=target_named("modelopt", sm=sm))
        (kept,) = experts(of, target=target_named("modelopt", sm=90))

        assert elsewhere == Assignment(holding=None, reason=reason)
        assert mode(kept) == "W4A8_AWQ g128"
        assert kept.holding.note == "the engine rounds input scales to the model's dtype"

    @pytest.mark.parametrize("sm", [None, *SMS])
    def test_linears_never_get_the_mode_whose_products_are_rounded(self, sm):
        assignment = alone(W4AFP8_STATIC, target=target_named("modelopt", engine="stock-1.3", sm=sm))

        assert mode(assignment) == ("dequantized" if sm == 120 else "W4A16_AWQ g128")

    @pytest.mark.parametrize(("of", "algo"), [(MXFP8_A8, "MXFP8"), (NVFP4_A16, "W4A16_NVFP4")], ids=label)
    def test_the_reason_names_a_newer_engine_that_has_the_kernel(self, of, algo):
        (assignment,) = experts(of)

        assert assignment.reason == f"stock-1.2 has no {algo} expert kernel; stock-1.3 has one"

    @pytest.mark.parametrize(
        ("sm", "expected"),
        [(90, "W4A16_MXFP4 g32"), (100, "W4A8_MXFP4_MXFP8 g32"), (120, "W4A8_MXFP4_MXFP8 g32"), (89, "dequantized")],
    )
    @pytest.mark.parametrize("of", [MXFP4_EXPERT, replace(MXFP4_EXPERT, scheme=MXFP4_W4A4.scheme)], ids=label)
    def test_the_sm_decides_the_mode_of_mxfp4_experts(self, of, sm, expected):
        assert {mode(assignment) for assignment in experts(of, of, target=target_named("modelopt", sm=sm))} == {
            expected
        }

    def test_without_an_sm_the_reason_names_those_that_keep_mxfp4_experts(self):
        reason = (
            "W4A16_MXFP4 has an expert kernel on SM90 only; "
            "W4A8_MXFP4_MXFP8 has an expert kernel on SM100 and SM120 only; kept with --sm 90 or --sm 100 or --sm 120"
        )
        assert experts(MXFP4_EXPERT) == [Assignment(holding=None, reason=reason)]
        assert [mode(assignment) for assignment in experts(MXFP4_EXPERT, target=REFERENCE)] == ["W4A16_MXFP4 g32"]

    @pytest.mark.parametrize(("plain", "verb"), [(1, "is"), (4, "are")])
    def test_one_plain_expert_makes_all_plain(self, plain, verb):
        first, *_, last = experts(STATIC_FP8, *[None] * plain, STATIC_FP8)

        reason = f"experts has one mode for all its parts, and up_proj {verb} stored plain"
        assert first == last == Assignment(holding=None, reason=reason)

    def test_experts_of_different_schemes_are_dequantized(self):
        assert {mode(assignment) for assignment in experts(NVFP4_W4A4, STATIC_FP8)} == {"dequantized"}


def inputs_of(args: QuantArgs) -> st.SearchStrategy[QuantArgs | None]:
    """Activations that writers put beside such weights, and some that they don't."""
    kinds = [None, FP8_STATIC, FP8_TOKEN, FP8_GROUP, INT8_TOKEN, replace(FP8_STATIC, symmetric=False)]
    own = {16: [NVFP4_INPUT], 32: [MXFP8_INPUT, MXFP4_INPUT]}.get(args.group_size or 0, [])
    return st.sampled_from(kinds + own)


ARGUMENTS = st.one_of(
    st.builds(ints, st.integers(1, 8), st.sampled_from([None, 16, 32, 64, 128, 256])),
    st.builds(ints, st.integers(1, 8), st.none(), st.just(Strategy.TENSOR)),
    st.sampled_from([FP8_TENSOR, FP8_CHANNEL, blocks(), blocks(64, 128), NVFP4, MXFP4, MXFP6, MXFP8]),
)


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    """A weight of any scheme that the formats store, of any shape that its groups divide."""
    args = draw(ARGUMENTS)
    integer = args.type is NumberType.INT
    columns = draw(st.integers(1, 8)) * (args.group_size or draw(st.sampled_from([8, 16, 64, 96])))
    return weight(
        args,
        draw(inputs_of(args)),
        shape=(draw(st.sampled_from([8, 16, 24, 128, 200])), columns),
        has_zero_point=integer and draw(st.booleans()),
        permuted=integer and args.group_size is not None and draw(st.booleans()),
        fused=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


def holds(row: LinearMode, of: Weight, platform: Platform | None) -> bool:
    """Whether an entry of the table holds a weight; a slow and simple version of `holdings`."""
    args, (rows, columns) = of.args, of.shape
    asked = activations_of(of.scheme)
    both_scalars = asked is Activations.FP8_STATIC and args.strategy is Strategy.TENSOR and row.element is Element.E4M3
    noted = asked in row.other_activations and not both_scalars
    scale = {"two_level": row.scale is ScaleForm.TWO_LEVEL, "exponent_scale": row.scale is ScaleForm.EXPONENT}
    return all(
        [
            row.element is of.element,
            args.num_bits in row.bits,
            args.strategy in row.exact | row.widened,
            not row.group_sizes or any(in_groups(row, args.group_size, size, columns) for size in row.group_sizes),
            args.group_size is None or row.group_sizes != (),
            args.block_structure in {None, row.block},
            row.zero_point or not of.has_zero_point,
            not of.permuted,
            asked is row.activations or noted,
            rows % (row.fused_row_multiple if of.fused else row.row_multiple) == 0,
            columns % row.column_multiple == 0,
            not of.expert or (rows % row.expert_multiple, columns % row.expert_multiple) == (0, 0),
            platform is None or runs_everywhere(row, of, platform.release),
            all(getattr(of, name) is wanted for name, wanted in scale.items()),
        ]
    )


def in_groups(row: LinearMode, stored: int | None, size: int, columns: int) -> bool:
    """Whether the stored groups, or rows without groups, consist of whole groups of this size of the mode."""
    if row.scale is not ScaleForm.GROUP:
        return stored == size
    return columns % size == 0 and (stored is None or (stored % size == 0 and columns % stored == 0))


def runs_everywhere(row: LinearMode, of: Weight, release: Release) -> bool:
    """Whether a release adds the bias, and takes the columns on every SM; false if it must know the SM."""
    adds_bias = of.expert or not of.bias or row.bias_since is None or release.has(row.bias_since)
    return adds_bias and not row.known_sm and all(of.shape[1] % row.columns_on(sm) == 0 for sm in SMS)


@settings(max_examples=400, deadline=None)
@given(of=weights(), target=st.sampled_from([*STOCK, *TARGETS.values()]), expert=st.booleans())
def test_a_module_is_native_exactly_if_the_tables_say_so(of: Weight, target: Target, expert: bool) -> None:
    """The general rule: a mode of the target that holds the weight, unchanged if one does, or else a reason."""
    of = replace(of, expert=expert)
    platform = target.capabilities.platform
    able = {row.algo for row in LINEAR_MODES if holds(row, of, platform)} & target.algos(expert=expert)

    assignment = assigned(of, site(expert=expert), target)

    assert (assignment.holding is not None) is bool(able)
    if assignment.holding is None:
        assert assignment.reason
    else:
        assert assignment.holding.mode.algo in able
        exact = any(of.args.strategy in row.exact for row in LINEAR_MODES if row.algo in able)
        assert assignment.holding.as_is <= exact
        assert bool(assignment.reason) is not assignment.holding.as_is
        asked, given_ = activations_of(of.scheme), assignment.holding.mode.activations
        assert bool(assignment.holding.note) is (asked is not given_)


@settings(max_examples=200, deadline=None)
@given(
    of=st.lists(st.one_of(st.none(), weights()), min_size=3, max_size=3),
    target=st.sampled_from([*STOCK, *TARGETS.values()]),
)
def test_members_of_a_group_always_get_one_mode(of: list[Weight | None], target: Target) -> None:
    result = fused(*of, target=target)

    assert len({assignment.holding.key if assignment and assignment.holding else None for assignment in result}) == 1
    for assignment in result:
        assert assignment is None or assignment.holding is not None or assignment.reason


def test_repeated_scales_change_no_value(tmp_path: Path) -> None:
    """A qkv with group and channel scales becomes one W4A16_AWQ Linear, and every weight is still exact."""
    schemes = {"q_proj": "int4-g64", "k_proj": "int4-channel", "v_proj": "int4-g128"}
    built = write_checkpoint(tmp_path, config=tiny_config(hidden=128, layers=1), scheme=schemes)
    checkpoint = open_checkpoint(tmp_path)
    plan = checkpoint.plan()
    delivered = {module.name: tensors for module, tensors in stream_delivered(plan, checkpoint.catalog)}

    for name in (Q, K, V):
        module = plan.module(name)
        assert module.delivered_mode == "W4A16_AWQ g64"
        assert module.layer is not None
        exact = built.dense[f"{name}.weight"]
        tensors = {full.removeprefix(f"{name}."): tensor for full, tensor in delivered[name].items()}
        assert tensors["weight_scale"].shape == (exact.shape[0], 2)
        linear = ReferenceLinear(tensors, layer=module.layer, out_features=exact.shape[0], in_features=128, name=name)
        assert torch.equal(linear.dequantized_weight(torch.float64), exact)
