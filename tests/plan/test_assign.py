"""Which mode each module gets: alone, fused with equals, fused with others, and at targets that hold less."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from builders import tiny_config, write_checkpoint

from trtllm_ct.formats import FORMATS, StoredWeight
from trtllm_ct.pipeline import open_checkpoint, stream_delivered
from trtllm_ct.plan.architectures import Site
from trtllm_ct.plan.assign import Assignment, assign_modes
from trtllm_ct.plan.weights import QuantizedWeight
from trtllm_ct.reference import ReferenceLinear
from trtllm_ct.schemes import NumberType, QuantArgs, QuantScheme, Strategy
from trtllm_ct.targets import DENSE, MODELOPT, REFERENCE

if TYPE_CHECKING:
    from pathlib import Path

QKV = "model.layers.0.self_attn.qkv_proj"
Q, K, V = (f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv")
ALONE = "model.layers.0.mlp.down_proj"
SHAPE = (128, 256)


def int4(group_size: int | None = 128, *, strategy: Strategy | None = None, symmetric: bool = True) -> QuantScheme:
    strategy = strategy or (Strategy.GROUP if group_size else Strategy.CHANNEL)
    return QuantScheme(
        weights=QuantArgs(num_bits=4, strategy=strategy, group_size=group_size, symmetric=symmetric),
    )


INT8_CHANNEL = QuantScheme(weights=QuantArgs(num_bits=8, strategy=Strategy.CHANNEL))
INT8_GROUP = QuantScheme(weights=QuantArgs(num_bits=8, strategy=Strategy.GROUP, group_size=128))
_FP8 = QuantArgs(num_bits=8, type=NumberType.FLOAT)
FP8_STATIC = QuantScheme(weights=_FP8, input_activations=_FP8)
FP8_ROWWISE = QuantScheme(
    weights=replace(_FP8, strategy=Strategy.CHANNEL),
    input_activations=replace(_FP8, strategy=Strategy.TOKEN, dynamic=True),
)
FP8_WEIGHT_ONLY = QuantScheme(weights=_FP8)


def weight(scheme: QuantScheme, shape: tuple[int, int] = SHAPE) -> QuantizedWeight:
    """A weight of which only arguments, shape and the presence of a zero point matter here."""
    args = scheme.weights
    assert args is not None
    stored = StoredWeight(
        format=FORMATS[0],
        args=args,
        shape=shape,
        codes="weight_packed",
        packing=None,
        has_zero_point=not args.symmetric,
        consumed=(),
    )
    return QuantizedWeight(stored=stored, scheme=scheme, group="group_0")


def alone(scheme: QuantScheme, *, target=MODELOPT, module: str = ALONE, shape: tuple[int, int] = SHAPE) -> Assignment:
    site = Site(module=module, class_name="Linear", shape=shape)
    return assign_modes({module: weight(scheme, shape)}, [site], target)[module]


def fused(*schemes: QuantScheme | None, target=MODELOPT) -> list[Assignment | None]:
    """The assignments of q, k and v with these schemes; None is a plain member, which gets none."""
    members = dict(zip((Q, K, V), schemes, strict=True))
    sites = [Site(module=name, class_name="Linear", shape=SHAPE, fused=QKV) for name in members]
    weights = {name: weight(scheme) for name, scheme in members.items() if scheme is not None}
    assigned = assign_modes(weights, sites, target)
    assert assigned.keys() == weights.keys()
    return [assigned.get(name) for name in members]


def mode(assignment: Assignment | None) -> str:
    assert assignment is not None
    if assignment.holding is None:
        return "dequantized"
    algo, size = assignment.holding.key
    return f"{algo} g{size}" if size else str(algo)


class TestAlone:
    @pytest.mark.parametrize(
        ("scheme", "expected"),
        [
            (int4(128), "W4A16_AWQ g128"),
            (int4(64), "W4A16_AWQ g64"),
            (int4(None), "W4A16"),
            (int4(None, strategy=Strategy.TENSOR), "W4A16"),
            (INT8_CHANNEL, "W8A16"),
            (FP8_STATIC, "FP8"),
            (FP8_ROWWISE, "FP8_PER_CHANNEL_PER_TOKEN"),
        ],
        ids=lambda value: value.label() if isinstance(value, QuantScheme) else value,
    )
    @pytest.mark.parametrize("target", [MODELOPT, REFERENCE], ids=lambda target: target.name)
    def test_the_mode_that_holds_the_weight_as_it_is(self, scheme, expected, target):
        assignment = alone(scheme, target=target)

        assert mode(assignment) == expected
        assert assignment.reason == ""

    @pytest.mark.parametrize(
        ("scheme", "reason"),
        [
            (int4(32), "W4A16_AWQ holds groups of 64 or 128"),
            (int4(256), "W4A16_AWQ holds groups of 64 or 128"),
            (int4(None, symmetric=False), "W4A16 holds no zero points"),
            (INT8_GROUP, "W8A16 holds no scale per group"),
            (replace(INT8_CHANNEL, weights=QuantArgs(num_bits=8)), "W8A16 holds no scale per tensor"),
            (FP8_WEIGHT_ONLY, "FP8 computes on fp8 static per tensor activations"),
        ],
        ids=lambda value: value.label() if isinstance(value, QuantScheme) else "",
    )
    def test_a_weight_that_no_mode_holds_is_dequantized_and_says_why(self, scheme, reason):
        assignment = alone(scheme)

        assert mode(assignment) == "dequantized"
        assert reason in assignment.reason

    def test_asymmetric_int4_is_native_only_where_the_target_declares_the_method(self):
        scheme = int4(128, symmetric=False)

        assert mode(alone(scheme, target=REFERENCE)) == "W4A16_GPTQ g128"
        assert alone(scheme) == Assignment(
            holding=None, reason="W4A16_GPTQ would hold it, and target modelopt has no such Linear"
        )

    @pytest.mark.parametrize("shape", [(24, 256), (128, 96)])
    @pytest.mark.parametrize("scheme", [int4(None), INT8_CHANNEL], ids=["int4", "int8"])
    def test_sizes_that_the_kernel_asserts_are_dequantized(self, scheme, shape):
        assignment = alone(scheme, shape=shape)

        assert mode(assignment) == "dequantized"
        assert "needs out % 16 == 0 and in % 64 == 0" in assignment.reason

    @pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
    def test_embeddings_and_lm_head_stay_plain_in_every_release(self, module):
        assert alone(int4(128), module=module) == Assignment(
            holding=None, reason=f"target modelopt keeps {module} plain"
        )

    def test_a_plain_target_dequantizes_everything(self):
        assert alone(int4(128), target=DENSE).reason == "target dense holds plain weights only"


class TestFused:
    @pytest.mark.parametrize("scheme", [int4(128), int4(None), INT8_CHANNEL, FP8_STATIC, FP8_ROWWISE])
    def test_equal_members_keep_their_mode(self, scheme):
        assert {mode(assignment) for assignment in fused(scheme, scheme, scheme)} == {mode(alone(scheme))}

    def test_channel_joins_groups_by_repeating_its_scales(self):
        q, k, v = fused(int4(128), int4(None), int4(128))

        assert [mode(q), mode(k), mode(v)] == ["W4A16_AWQ g128"] * 3
        assert [q.reason, k.reason, v.reason] == ["", f"scales repeated so that {QKV} has one mode", ""]

    @pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
    def test_groups_of_128_join_groups_of_64(self, order):
        schemes = [int4(128), int4(64), int4(128)]

        assigned = fused(*(schemes[i] for i in order))

        assert {mode(assignment) for assignment in assigned} == {"W4A16_AWQ g64"}

    def test_tensor_and_channel_scales_meet_in_scales_per_row(self):
        q, k, v = fused(int4(None, strategy=Strategy.TENSOR), int4(None), int4(None))

        assert [mode(q), mode(k), mode(v)] == ["W4A16"] * 3

    def test_members_without_a_common_mode_are_dequantized_and_all_schemes_named(self):
        assigned = fused(FP8_ROWWISE, int4(128), int4(128))

        reason = (
            f"the engine fuses it into {QKV}, whose parts share no mode (q_proj: fp8 channel, input fp8 token dynamic; "
            "k_proj: int4 group 128; v_proj: int4 group 128)"
        )
        assert assigned == [Assignment(holding=None, reason=reason)] * 3

    def test_zero_points_in_one_member_part_the_group_where_the_target_lacks_them(self):
        q, k, v = fused(int4(128), int4(128, symmetric=False), int4(128))

        assert [mode(q), mode(k), mode(v)] == ["dequantized"] * 3
        assert "share no mode" in q.reason
        assert k.reason == "W4A16_GPTQ would hold it, and target modelopt has no such Linear"

    def test_a_plain_member_makes_the_group_plain(self):
        q, k, v = fused(int4(128), None, INT8_GROUP)

        assert k is None
        assert q.reason == f"the engine fuses it into {QKV}, and k_proj is stored plain"
        assert v.reason == "W8A16 holds no scale per group"

    def test_a_plain_group_is_assigned_nothing(self):
        assert fused(None, None, None) == [None, None, None]


def test_repeated_scales_change_no_value(tmp_path: Path) -> None:
    """One qkv of groups and channels becomes one W4A16_AWQ, whose every weight is still exact."""
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
