"""Arguments inside a block: defaults, aliases, and combinations that are invalid."""

from __future__ import annotations

import pytest

from trtllm_ct.base.errors import ConfigError
from trtllm_ct.base.schemes import ActOrder, NumberType, QuantArgs, Strategy
from trtllm_ct.config.reader import CompressedTensorsConfigReader

INT4 = {"num_bits": 4, "group_size": 128}


def read_args(key: str, arguments: dict[str, object]) -> QuantArgs:
    """Arguments of the one group of a block, under `weights` or `input_activations`."""
    block = {"config_groups": {"g": {"targets": ["Linear"], key: arguments}}}
    (group,) = CompressedTensorsConfigReader().read(block).groups
    args = getattr(group.scheme, key)
    assert isinstance(args, QuantArgs)
    return args


def read_weights(**arguments: object) -> QuantArgs:
    return read_args("weights", arguments)


def faulty_keys(key: str, arguments: dict[str, object]) -> set[str]:
    with pytest.raises(ConfigError) as caught:
        read_args(key, arguments)
    prefix = f"quantization_config.config_groups.g.{key}."
    return {fault.where.removeprefix(prefix) for fault in caught.value.faults}


def test_empty_arguments_have_all_defaults():
    assert read_weights() == QuantArgs(num_bits=8)


def test_a_full_dump_of_an_old_release():
    """Old releases write every field, with null for what is unset."""
    unset = dict.fromkeys(("actorder", "block_structure", "scale_dtype", "zp_dtype", "observer"))
    dump = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    args = read_weights(**dump, **unset, dynamic=False, observer_kwargs={})
    assert args == QuantArgs(num_bits=4, strategy=Strategy.GROUP, group_size=128)


@pytest.mark.parametrize(
    ("given", "strategy", "group_size"),
    [
        ({}, Strategy.TENSOR, None),
        ({"strategy": None, "group_size": 32}, Strategy.GROUP, 32),
        ({"group_size": -1}, Strategy.CHANNEL, None),
        ({"group_size": -1, "strategy": "channel"}, Strategy.CHANNEL, None),
        ({"group_size": 64.0}, Strategy.GROUP, 64),
        ({"strategy": "CHANNEL"}, Strategy.CHANNEL, None),
        ({"strategy": "tensor_group", "group_size": 16}, Strategy.TENSOR_GROUP, 16),
    ],
)
def test_the_strategy_follows_from_the_group_size(given, strategy, group_size):
    args = read_weights(**given)
    assert (args.strategy, args.group_size) == (strategy, group_size)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        (False, None),
        (True, ActOrder.GROUP),
        ("group", ActOrder.GROUP),
        ("dynamic", ActOrder.GROUP),
        ("weight", ActOrder.WEIGHT),
        ("Static", ActOrder.WEIGHT),
    ],
)
def test_actorder_has_aliases(given, expected):
    assert read_weights(**INT4, actorder=given).actorder is expected


@pytest.mark.parametrize("given", [[128, 64], "128x64", "128X64", " 128 x 64 "])
def test_block_structure_is_a_list_or_a_string(given):
    args = read_weights(type="float", strategy="block", block_structure=given)
    assert args.block_structure == (128, 64)


@pytest.mark.parametrize("given", ["torch.float8_e4m3fn", "float8_e4m3fn"])
def test_dtypes_lose_their_prefix(given):
    assert read_weights(**INT4, scale_dtype=given).scale_dtype == "float8_e4m3fn"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"symmetric": False}, "int8"),
        ({"symmetric": False, "zp_dtype": "torch.uint8"}, "uint8"),
        ({"symmetric": False, "type": "float"}, "float8_e4m3fn"),
        ({"symmetric": True, "zp_dtype": "torch.int8"}, None),
    ],
)
def test_only_asymmetric_arguments_have_a_zero_point_dtype(given, expected):
    assert read_weights(**given).zp_dtype == expected


def test_local_scales_are_dynamic_within_tensor_groups():
    given = {"num_bits": 4, "type": "FLOAT", "strategy": "tensor_group", "group_size": 16, "dynamic": "LOCAL"}
    args = read_args("input_activations", given)
    assert (args.dynamic, args.type) == ("local", NumberType.FLOAT)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"num_bits": 0}, "num_bits"),
        ({"num_bits": 9}, "num_bits"),
        ({"num_bits": "4"}, "num_bits"),
        ({"num_bits": 4.5}, "num_bits"),
        ({"num_bits": float("nan")}, "num_bits"),
        ({"num_bits": True}, "num_bits"),
        ({"num_bits": None}, "num_bits"),
        ({"type": "float", "num_bits": 16}, "num_bits"),
        ({"type": "float", "num_bits": 5}, "num_bits"),
        ({"type": "bfloat"}, "type"),
        ({"type": None}, "type"),
        ({"symmetric": "yes"}, "symmetric"),
        ({"symmetric": 1}, "symmetric"),
        ({"symmetric": None}, "symmetric"),
        ({"strategy": "row"}, "strategy"),
        ({"strategy": 3}, "strategy"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": -2}, "group_size"),
        ({"group_size": "128"}, "group_size"),
        ({"group_size": 128, "strategy": "channel"}, "group_size"),
        ({"group_size": 128, "strategy": "tensor"}, "group_size"),
        ({"strategy": "group"}, "group_size"),
        ({"strategy": "group", "group_size": -1}, "group_size"),
        ({"strategy": "block"}, "block_structure"),
        ({"strategy": "channel", "block_structure": [128, 128]}, "block_structure"),
        ({"strategy": "block", "block_structure": [128]}, "block_structure"),
        ({"strategy": "block", "block_structure": [128, 0]}, "block_structure"),
        ({"strategy": "block", "block_structure": "128"}, "block_structure"),
        ({"strategy": "block", "block_structure": "ax2"}, "block_structure"),
        ({"strategy": "block", "block_structure": {}}, "block_structure"),
        ({"dynamic": "always"}, "dynamic"),
        ({"dynamic": None}, "dynamic"),
        ({"dynamic": True}, "dynamic"),  # weights have stored scales
        ({"dynamic": "local"}, "dynamic"),
        ({"strategy": "token"}, "dynamic"),
        ({"strategy": "token", "dynamic": True}, "strategy"),
        ({"strategy": "attn_head"}, "strategy"),
        ({"actorder": "sorted"}, "actorder"),
        ({"actorder": 1}, "actorder"),
        ({"scale_dtype": "torch.float7"}, "scale_dtype"),
        ({"scale_dtype": 8}, "scale_dtype"),
        ({"zp_dtype": "integer"}, "zp_dtype"),
    ],
    ids=repr,
)
def test_an_invalid_value_is_a_fault_at_its_key(given, key):
    assert faulty_keys("weights", given) == {key}


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"strategy": "channel"}, "strategy"),
        ({"strategy": "block", "block_structure": [1, 1]}, "strategy"),
        ({"strategy": "channel", "dynamic": True}, "strategy"),
        ({"strategy": "token"}, "dynamic"),
        ({"actorder": "weight"}, "actorder"),
    ],
)
def test_activations_have_their_own_limits(given, key):
    assert faulty_keys("input_activations", given) == {key}
