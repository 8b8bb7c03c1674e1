"""The table of formats as a whole: which modules it accepts, and that no two entries accept the same module."""

from __future__ import annotations

from itertools import product

import pytest

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import NumberType, QuantArgs, Strategy, TensorSpec
from trtllm_ct.formats import FORMATS, WEIGHT_TENSORS, Axis, WeightFormat, format_for
from trtllm_ct.formats.base import scale_shape

ARGUMENTS = [
    *(QuantArgs(num_bits=bits, symmetric=symmetric) for bits, symmetric in product(range(1, 9), (True, False))),
    *(QuantArgs(num_bits=bits, type=NumberType.FLOAT) for bits in (4, 6, 8)),
    *(
        QuantArgs(num_bits=bits, type=number, strategy=strategy, group_size=size)
        for bits, number in ((4, NumberType.INT), (8, NumberType.INT), (4, NumberType.FLOAT), (8, NumberType.FLOAT))
        for strategy, size in (
            (Strategy.CHANNEL, None),
            (Strategy.GROUP, 32),
            (Strategy.BLOCK, None),
            (Strategy.TENSOR_GROUP, 16),
        )
    ),
    *(
        QuantArgs(num_bits=bits, type=NumberType.FLOAT, strategy=strategy, group_size=size)
        for bits, strategy, size in product((4, 6, 8), (Strategy.GROUP, Strategy.TENSOR_GROUP), (16, 32, 64))
    ),
]
NAMES = ("weight", "weight_packed")
MATRIX = (16, 16)


def stored(names: dict[str, DType]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(dtype, MATRIX) for name, dtype in names.items()}


def stored_modules() -> list[dict[str, TensorSpec]]:
    """Modules with codes of any dtype under either name, or under both, and with scales of any dtype, or none."""
    codes = [{name: dtype} for name, dtype in product(NAMES, DType)]
    codes += [{"weight": plain, "weight_packed": packed} for plain, packed in product((DType.I8, DType.F8_E4M3), DType)]
    return [stored(entry | ({"weight_scale": scale} if scale else {})) for entry in codes for scale in (*DType, None)]


def test_no_module_is_accepted_by_two_formats() -> None:
    modules = stored_modules()
    both = {"weight", "weight_packed"}
    for args, module in product(ARGUMENTS, modules):
        accepting = [entry.name for entry in FORMATS if entry.accepts(args, module)]
        # A module with both names is refused before its format matters.
        if not both <= module.keys():
            assert len(accepting) <= 1, (args.label(), module, accepting)


@pytest.mark.parametrize(
    ("args", "tensors", "name"),
    [
        (QuantArgs(num_bits=4), {"weight_packed": DType.I32, "weight_scale": DType.BF16}, "pack-quantized"),
        (QuantArgs(num_bits=8), {"weight_packed": DType.I32, "weight_scale": DType.F32}, "pack-quantized"),
        (QuantArgs(num_bits=8), {"weight": DType.I8, "weight_scale": DType.F16}, "int-quantized"),
        (QuantArgs(num_bits=4), {"weight": DType.I8, "weight_scale": DType.BF16}, "int-quantized"),
        (
            QuantArgs(num_bits=8, type=NumberType.FLOAT),
            {"weight": DType.F8_E4M3, "weight_scale": DType.BF16},
            "float-quantized",
        ),
    ],
    ids=["int4 words", "int8 words", "int8", "int4 in bytes", "fp8"],
)
def test_which_format_accepts_a_module(args: QuantArgs, tensors: dict[str, DType], name: str) -> None:
    entry = format_for(args, stored(tensors))
    assert entry is not None
    assert entry.name == name


@pytest.mark.parametrize(
    ("args", "tensors"),
    [
        (QuantArgs(num_bits=4), {"weight_packed": DType.U8, "weight_scale": DType.F8_E4M3}),
        (QuantArgs(num_bits=8, type=NumberType.FLOAT), {"weight": DType.F8_E5M2, "weight_scale": DType.BF16}),
        (QuantArgs(num_bits=8, type=NumberType.FLOAT), {"weight": DType.I8, "weight_scale": DType.BF16}),
        (QuantArgs(num_bits=8), {"weight": DType.F8_E4M3, "weight_scale": DType.BF16}),
        (QuantArgs(num_bits=8), {"weight": DType.BF16, "weight_scale": DType.BF16}),
        (QuantArgs(num_bits=8), {"compressed": DType.I8, "bitmask": DType.U8}),
        (QuantArgs(num_bits=8), {}),
    ],
    ids=[
        "fp4 as ints",
        "e5m2",
        "ints as floats",
        "floats as ints",
        "plain",
        "sparse",
        "none",
    ],
)
def test_modules_that_no_format_accepts(args: QuantArgs, tensors: dict[str, DType]) -> None:
    assert format_for(args, stored(tensors)) is None


def fp(bits: int, group_size: int) -> QuantArgs:
    return QuantArgs(num_bits=bits, type=NumberType.FLOAT, strategy=Strategy.GROUP, group_size=group_size)


def packed_floats() -> list[dict[str, TensorSpec]]:
    """Modules of 16 x 64: 4 or 6 bits, groups of 16 or 32, a scale of any dtype or none, a global scale or none."""
    return [
        {"weight_packed": TensorSpec(DType.U8, (16, width))}
        | ({"weight_scale": TensorSpec(scale, (16, groups))} if scale else {})
        | ({"weight_global_scale": TensorSpec(DType.F32, (1,))} if has_global else {})
        for width, scale, groups, has_global in product((32, 48), (*DType, None), (4, 2), (True, False))
    ]


@pytest.mark.parametrize("args", ARGUMENTS, ids=QuantArgs.label)
def test_one_format_accepts_packed_floats_if_the_arguments_are_4_or_6_bit_floats_and_no_format_otherwise(
    args: QuantArgs,
) -> None:
    """So if anything else is wrong with such a module, one format describes it and reports the fault."""
    wanted = 1 if args.type is NumberType.FLOAT and args.num_bits in {4, 6} else 0
    for module in packed_floats():
        accepting = [entry.name for entry in FORMATS if entry.accepts(args, module)]
        assert len(accepting) == wanted, (module, accepting)


@pytest.mark.parametrize(
    ("args", "codes", "scale", "name"),
    [
        (fp(4, 16), DType.U8, DType.F8_E4M3, "nvfp4-pack-quantized"),
        (fp(4, 32), DType.U8, DType.F8_E4M3, "nvfp4-pack-quantized"),
        (fp(4, 16), DType.U8, DType.U8, "nvfp4-pack-quantized"),
        (fp(4, 16), DType.U8, DType.BF16, "nvfp4-pack-quantized"),
        (fp(4, 32), DType.U8, DType.U8, "mxfp4-pack-quantized"),
        (fp(4, 16), DType.U8, DType.F8_E8M0, "mxfp4-pack-quantized"),
        (fp(4, 32), DType.U8, DType.F8_E8M0, "mxfp4-pack-quantized"),
        (fp(4, 32), DType.U8, DType.BF16, "mxfp4-pack-quantized"),
        (fp(6, 32), DType.U8, DType.U8, "mxfp6-pack-quantized"),
        (fp(6, 32), DType.U8, DType.F8_E8M0, "mxfp6-pack-quantized"),
        (fp(8, 32), DType.F8_E4M3, DType.U8, "mxfp8-quantized"),
        (fp(8, 32), DType.F8_E4M3, DType.F8_E8M0, "mxfp8-quantized"),
        (fp(8, 32), DType.F8_E4M3, DType.F32, "float-quantized"),
    ],
)
def test_the_dtype_of_the_scale_selects_the_small_float_format_or_else_the_group_size_does(
    args: QuantArgs, codes: DType, scale: DType, name: str
) -> None:
    local = "weight" if args.num_bits == 8 else "weight_packed"
    entry = format_for(args, stored({local: codes, "weight_scale": scale}))
    assert entry is not None
    assert entry.name == name


def test_names_are_unique() -> None:
    assert len({entry.name for entry in FORMATS}) == len(FORMATS)


@pytest.mark.parametrize(
    ("args", "shape"),
    [
        (QuantArgs(num_bits=8), (1, 1)),
        (QuantArgs(num_bits=8, strategy=Strategy.CHANNEL), (300, 1)),
        (QuantArgs(num_bits=8, strategy=Strategy.GROUP, group_size=50), (300, 4)),
        (QuantArgs(num_bits=8, strategy=Strategy.GROUP, group_size=64), (300, 4)),
        (QuantArgs(num_bits=8, strategy=Strategy.GROUP, group_size=512), (300, 1)),
        (QuantArgs(num_bits=8, strategy=Strategy.BLOCK, block_structure=(128, 64)), (3, 4)),
    ],
    ids=lambda value: value.label() if isinstance(value, QuantArgs) else None,
)
def test_how_many_scales_a_weight_has(args: QuantArgs, shape: tuple[int, int]) -> None:
    """The weight has 300 rows and 200 columns, so that the last group or block may be short."""
    assert scale_shape(args, (300, 200)) == shape


@pytest.mark.parametrize("entry", FORMATS, ids=lambda entry: entry.name)
def test_a_format_says_what_each_of_its_tensors_belongs_to(entry: WeightFormat) -> None:
    """Tiles, ranks and fused experts cut by it."""
    assert entry.axes[entry.codes] in {Axis.ROWS, Axis.TILES}
    assert set(entry.axes) <= set(WEIGHT_TENSORS)


def test_formats_agree_on_a_tensor_but_for_tiles() -> None:
    """Fused experts are cut before their format is known, by names alone."""
    shared = {name: axes - {Axis.TILES} for name, axes in WEIGHT_TENSORS.items()}

    assert all(len(axes) <= 1 for axes in shared.values())
