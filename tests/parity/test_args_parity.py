"""Arguments and presets read as the compressed-tensors library reads them."""

from __future__ import annotations

from itertools import product

import pytest

from trtllm_ct.base.schemes import ActOrder, NumberType, QuantArgs, Strategy
from trtllm_ct.config.arguments import read_quant_args
from trtllm_ct.config.json_object import Findings, JsonObject
from trtllm_ct.config.presets import PRESETS
from trtllm_ct.config.reader import CompressedTensorsConfigReader

pytestmark = pytest.mark.library

ABSENT = object()
GRID = {
    "type": (ABSENT, "FLOAT", "bfloat", None),
    "num_bits": (ABSENT, 4, 6.0, 5, "four"),
    "group_size": (ABSENT, None, -1, 32, -2),
    "strategy": (ABSENT, None, "tensor", "Channel", "group", "token", "tensor_group", "attn_head", "row"),
    "dynamic": (ABSENT, True, "local", "remote"),
}
OTHERS = (
    {"symmetric": False},
    {"symmetric": False, "type": "float"},
    {"symmetric": False, "zp_dtype": "torch.uint8"},
    {"symmetric": "maybe"},
    {"symmetric": None},
    {"strategy": "block"},
    {"strategy": "block", "block_structure": [128, 64]},
    {"strategy": "block", "block_structure": "128x64"},
    {"strategy": "block", "block_structure": [128, 64], "dynamic": True},
    {"strategy": "block", "block_structure": [128]},
    {"strategy": "block", "block_structure": [128, -1]},
    {"strategy": "block", "block_structure": "axb"},
    {"block_structure": [128, 64]},
    {"actorder": "weight", "group_size": 64},
    {"actorder": "static"},
    {"actorder": False},
    {"actorder": "sorted"},
    {"scale_dtype": "torch.uint8"},
    {"scale_dtype": "float8_e4m3fn"},
    {"scale_dtype": "float7"},
    {"zp_dtype": "integer"},
    {"observer": "mse", "observer_kwargs": {"maxshrink": 0.2}},
)
# This package refuses these arguments although the library accepts them: no format stores them, or they are ambiguous.
STRICTER = (
    {"num_bits": 16},
    {"num_bits": 0},
    {"num_bits": "4"},
    {"group_size": 0, "strategy": "channel"},
    {"symmetric": 1},
    {"symmetric": "true"},
    {"dynamic": 1},
)
# This package reads these arguments although 0.20 refuses them: older releases wrote them, and their meaning is known.
LOOSER = (
    ({"actorder": "group", "group_size": 64}, "int4 group 64 actorder group"),
    ({"actorder": "dynamic", "group_size": 64}, "int4 group 64 actorder group"),
    ({"actorder": True, "group_size": 64}, "int4 group 64 actorder group"),
    ({"producer_note": 1}, "int4 tensor"),
)


def ours(given: dict[str, object]) -> QuantArgs | None:
    return read_quant_args(JsonObject(given, "weights", Findings()))


def theirs(given: dict[str, object]):
    """The library's arguments, None where it refuses; it fails in more ways than validation errors."""
    from compressed_tensors.quantization import QuantizationArgs

    try:
        return QuantizationArgs(**given)
    except (ValueError, TypeError, NotImplementedError):
        return None


def as_ours(args) -> QuantArgs:
    """The library's arguments as `QuantArgs`: no group size without groups, no zero-point dtype without zero points."""
    return QuantArgs(
        num_bits=args.num_bits,
        type=NumberType(args.type),
        symmetric=args.symmetric,
        strategy=Strategy(args.strategy),
        group_size=args.group_size if args.group_size != -1 else None,
        block_structure=tuple(args.block_structure) if args.block_structure else None,
        dynamic=args.dynamic,
        actorder=ActOrder.WEIGHT if args.actorder else None,
        scale_dtype=args.scale_dtype and str(args.scale_dtype).removeprefix("torch."),
        zp_dtype=None if args.symmetric else str(args.zp_dtype).removeprefix("torch."),
    )


def grid() -> list[dict[str, object]]:
    points = (dict(zip(GRID, values, strict=True)) for values in product(*GRID.values()))
    return [{key: value for key, value in point.items() if value is not ABSENT} for point in points]


@pytest.mark.newest_library
def test_every_point_of_the_grid_is_read_or_refused_alike():
    """All fields are equal if the library accepts the arguments; if it refuses them, so does this package."""
    points = grid()
    differing = []
    accepted = 0
    for given in points:
        mine, other = ours(given), theirs(given)
        accepted += other is not None
        if mine != (as_ours(other) if other is not None else None):
            differing.append((given, mine, other))
    assert differing == []
    assert 100 < accepted < len(points) / 2


@pytest.mark.newest_library
@pytest.mark.parametrize("given", OTHERS, ids=repr)
def test_the_fields_outside_the_grid(given):
    other = theirs(given)
    assert ours(given) == (as_ours(other) if other is not None else None)


@pytest.mark.parametrize("given", STRICTER, ids=repr)
def test_what_we_refuse_and_the_library_accepts(given):
    assert theirs(given) is not None
    assert ours(given) is None


@pytest.mark.newest_library
@pytest.mark.parametrize(("given", "label"), LOOSER, ids=repr)
def test_what_we_read_and_the_library_refuses(given, label):
    assert theirs({"num_bits": 4, **given}) is None
    read = ours({"num_bits": 4, **given})
    assert read is not None
    assert read.label() == label


@pytest.mark.newest_library
def test_the_preset_table_is_the_library_s():
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    assert set(PRESETS) == set(PRESET_SCHEMES)


@pytest.mark.newest_library
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_equals_the_library_s_field_by_field(name):
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(name, ["Linear"])
    for field in ("weights", "input_activations", "output_activations"):
        other = getattr(scheme, field)
        assert getattr(PRESETS[name], field) == (as_ours(other) if other is not None else None), field


@pytest.mark.newest_library
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reads_the_same_by_name_and_as_the_library_dumps_it(name):
    """Writers expand presets; both forms must end in one scheme."""
    from compressed_tensors.quantization import QuantizationConfig

    by_name = {"config_groups": {name: ["Linear"]}, "version": "0.20.0"}
    dumped = QuantizationConfig.model_validate(by_name).model_dump(mode="json")
    reader = CompressedTensorsConfigReader()
    (short,) = reader.read(by_name).groups
    (full,) = reader.read({**dumped, "format": None, "version": "0.20.0"}).groups
    assert short == full
