"""The table of modes: the schemes that each holds unchanged, by repeating scales, with a note, or not at all.

The expected values are written out, so that a change of the table changes an expectation here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from quantized_weights import (
    FP8_CHANNEL,
    FP8_GROUP,
    FP8_STATIC,
    FP8_TENSOR,
    FP8_TOKEN,
    INT8_STATIC,
    INT8_TOKEN,
    MXFP4,
    MXFP4_INPUT,
    MXFP6,
    MXFP8,
    MXFP8_INPUT,
    NVFP4,
    NVFP4_INPUT,
    SHAPE,
    blocks,
    ints,
    weight,
)

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Element, QuantAlgo, QuantArgs, QuantScheme, Strategy
from trtllm_ct.engine.holdings import Holding, Weight, activations_of, holdings, native_mode, obstacles
from trtllm_ct.engine.modes import LINEAR_MODES, Activations
from trtllm_ct.engine.slices import Slices
from trtllm_ct.engine.target import MODELOPT, REFERENCE

AWQ = ("AWQModifier", "QuantizationModifier")
EVERY_ALGO = frozenset(mode.algo for mode in LINEAR_MODES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A weight, its family, and the modes that hold it.

    `=` as it is, `~` by repeating scales, a group size behind the slash, `*` with a note about activations.
    """

    weight: Weight
    native: str | None
    held: str = ""


INT4_GROUPS = "=W4A16_AWQ/{0} =W4A16_GPTQ/{0} ~W4A16_AWQ/64 ~W4A16_GPTQ/64"
INT4_ROWS = "=W4A16 ~W4A16_AWQ/128 ~W4A16_AWQ/64 ~W4A16_GPTQ/128 ~W4A16_GPTQ/64"
INT4_LARGE_GROUPS = "~W4A16_AWQ/128 ~W4A16_AWQ/64 ~W4A16_GPTQ/128 ~W4A16_GPTQ/64"
ROWS = {
    # Integers of up to 4 bits.
    "int4 g128": Row(weight=weight(ints(4, 128)), native="W4A16_GPTQ", held=INT4_GROUPS.format(128)),
    "int4 g64": Row(weight=weight(ints(4, 64)), native="W4A16_GPTQ", held="=W4A16_AWQ/64 =W4A16_GPTQ/64"),
    "int4 g32": Row(weight=weight(ints(4, 32)), native="W4A16_GPTQ"),
    "int4 g256": Row(weight=weight(ints(4, 256)), native="W4A16_GPTQ", held=INT4_LARGE_GROUPS),
    "int4 g512": Row(weight=weight(ints(4, 512)), native="W4A16_GPTQ", held=INT4_LARGE_GROUPS),
    "int4 g384": Row(weight=weight(ints(4, 384), shape=(256, 768)), native="W4A16_GPTQ", held=INT4_LARGE_GROUPS),
    "int4 g192": Row(
        weight=weight(ints(4, 192), shape=(256, 384)), native="W4A16_GPTQ", held="~W4A16_AWQ/64 ~W4A16_GPTQ/64"
    ),
    "int4 g96": Row(weight=weight(ints(4, 96), shape=(256, 384)), native="W4A16_GPTQ"),
    "int4 g256 asymmetric": Row(
        weight=weight(ints(4, 256), has_zero_point=True),
        native="W4A16_GPTQ",
        held="~W4A16_GPTQ/128 ~W4A16_GPTQ/64",
    ),
    "int4 channel": Row(weight=weight(ints(4)), native="W4A16_GPTQ", held=INT4_ROWS),
    "int4 tensor": Row(weight=weight(ints(4, None, Strategy.TENSOR)), native="W4A16_GPTQ", held=INT4_ROWS),
    "int4 g128 asymmetric": Row(
        weight=weight(ints(4, 128), has_zero_point=True),
        native="W4A16_GPTQ",
        held="=W4A16_GPTQ/128 ~W4A16_GPTQ/64",
    ),
    "int4 channel asymmetric": Row(
        weight=weight(ints(4), has_zero_point=True), native="W4A16_GPTQ", held="~W4A16_GPTQ/128 ~W4A16_GPTQ/64"
    ),
    "int4 g128 permuted": Row(weight=weight(ints(4, 128), permuted=True), native="W4A16_GPTQ"),
    "int3 g128": Row(weight=weight(ints(3, 128)), native="W4A16_GPTQ", held=INT4_GROUPS.format(128)),
    "int2 channel": Row(weight=weight(ints(2)), native="W4A16_GPTQ", held=INT4_ROWS),
    "int1 g64": Row(weight=weight(ints(1, 64)), native="W4A16_GPTQ", held="=W4A16_AWQ/64 =W4A16_GPTQ/64"),
    "int3 g32": Row(weight=weight(ints(3, 32)), native="W4A16_GPTQ"),
    "W4AFP8": Row(
        weight=weight(ints(4, 128), FP8_TOKEN),
        native="W4A16_GPTQ",
        held="=W4A16_AWQ/128* =W4A16_GPTQ/128* ~W4A16_AWQ/64* ~W4A16_GPTQ/64*",
    ),
    "W4AFP8 static": Row(
        weight=weight(ints(4, 128), FP8_STATIC),
        native="W4A16_GPTQ",
        held="=W4A16_AWQ/128* =W4A16_GPTQ/128* =W4A8_AWQ/128* ~W4A16_AWQ/64* ~W4A16_GPTQ/64*",
    ),
    "W4AFP8 static, float16 scales": Row(
        weight=weight(ints(4, 128), FP8_STATIC, scale_dtype=DType.F16),
        native="W4A16_GPTQ",
        held="=W4A16_AWQ/128* =W4A16_GPTQ/128* ~W4A16_AWQ/64* ~W4A16_GPTQ/64*",
    ),
    "W4AFP8 static, g256": Row(
        weight=weight(ints(4, 256), FP8_STATIC),
        native="W4A16_GPTQ",
        held="~W4A16_AWQ/128* ~W4A16_AWQ/64* ~W4A16_GPTQ/128* ~W4A16_GPTQ/64* ~W4A8_AWQ/128*",
    ),
    "W4A8": Row(
        weight=weight(ints(4), INT8_TOKEN),
        native="W4A16_GPTQ",
        held="=W4A16* ~W4A16_AWQ/128* ~W4A16_AWQ/64* ~W4A16_GPTQ/128* ~W4A16_GPTQ/64*",
    ),
    # Integers of 5 to 8 bits.
    "int8 channel": Row(weight=weight(ints(8)), native="W8A16", held="=W8A16"),
    "int8 tensor": Row(weight=weight(ints(8, None, Strategy.TENSOR)), native="W8A16", held="=W8A16"),
    "int6 channel": Row(weight=weight(ints(6)), native="W8A16", held="=W8A16"),
    "int5 g128": Row(weight=weight(ints(5, 128)), native="W8A16"),
    "int8 g128": Row(weight=weight(ints(8, 128)), native="W8A16"),
    "int8 channel asymmetric": Row(weight=weight(ints(8), has_zero_point=True), native="W8A16"),
    "W8A8 dynamic": Row(weight=weight(ints(8), INT8_TOKEN), native="W8A16", held="=W8A16*"),
    "W8A8 static": Row(weight=weight(ints(8, None, Strategy.TENSOR), INT8_STATIC), native="W8A16", held="=W8A16*"),
    "W8A8 asymmetric activations": Row(
        weight=weight(ints(8), replace(INT8_STATIC, symmetric=False)), native="W8A16", held="=W8A16*"
    ),
    "int8 with fp8 tokens": Row(weight=weight(ints(8), FP8_TOKEN), native="W8A16", held="=W8A16*"),
    # fp8.
    "fp8 static": Row(weight=weight(FP8_TENSOR, FP8_STATIC), native="FP8", held="=FP8"),
    "fp8 tensor, tokens": Row(weight=weight(FP8_TENSOR, FP8_TOKEN), native="FP8", held="=FP8_PER_CHANNEL_PER_TOKEN"),
    "fp8 channel, tokens": Row(weight=weight(FP8_CHANNEL, FP8_TOKEN), native="FP8", held="=FP8_PER_CHANNEL_PER_TOKEN"),
    "fp8 channel, static input": Row(
        weight=weight(FP8_CHANNEL, FP8_STATIC), native="FP8", held="=FP8_PER_CHANNEL_PER_TOKEN*"
    ),
    "fp8 tensor weight-only": Row(weight=weight(FP8_TENSOR), native="FP8"),
    "fp8 channel weight-only": Row(weight=weight(FP8_CHANNEL), native="FP8"),
    "fp8 static asymmetric input": Row(weight=weight(FP8_TENSOR, replace(FP8_STATIC, symmetric=False)), native="FP8"),
    "fp8 block": Row(weight=weight(blocks(), FP8_GROUP), native="FP8_BLOCK_SCALES", held="=FP8_BLOCK_SCALES"),
    "fp8 block, odd shape": Row(
        weight=weight(blocks(), FP8_GROUP, shape=(208, 80)), native="FP8_BLOCK_SCALES", held="=FP8_BLOCK_SCALES"
    ),
    "fp8 block weight-only": Row(weight=weight(blocks()), native="FP8_BLOCK_SCALES"),
    "fp8 block 64x128": Row(weight=weight(blocks(64), FP8_GROUP), native="FP8_BLOCK_SCALES"),
    "fp8 block, tokens": Row(weight=weight(blocks(), FP8_TOKEN), native="FP8_BLOCK_SCALES"),
    # Small floats.
    "NVFP4": Row(weight=weight(NVFP4, NVFP4_INPUT), native="NVFP4", held="=NVFP4/16"),
    "NVFP4, strategy group": Row(
        weight=weight(replace(NVFP4, strategy=Strategy.GROUP), replace(NVFP4_INPUT, dynamic=False)),
        native="NVFP4",
        held="=NVFP4/16",
    ),
    "NVFP4A16": Row(weight=weight(NVFP4), native="NVFP4", held="=W4A16_NVFP4/16"),
    "NVFP4 with fp8 tokens": Row(weight=weight(NVFP4, FP8_TOKEN), native="NVFP4"),
    "MXFP4": Row(
        weight=weight(MXFP4, MXFP4_INPUT), native="W4A16_MXFP4", held="=W4A16_MXFP4/32* =W4A8_MXFP4_MXFP8/32*"
    ),
    "MXFP4A16": Row(weight=weight(MXFP4), native="W4A16_MXFP4", held="=W4A16_MXFP4/32 =W4A8_MXFP4_MXFP8/32*"),
    "MXFP4XFP8": Row(
        weight=weight(MXFP4, FP8_GROUP), native="W4A16_MXFP4", held="=W4A16_MXFP4/32* =W4A8_MXFP4_MXFP8/32*"
    ),
    "MXFP4XMXFP8": Row(
        weight=weight(MXFP4, MXFP8_INPUT), native="W4A16_MXFP4", held="=W4A16_MXFP4/32* =W4A8_MXFP4_MXFP8/32"
    ),
    "MXFP6A8": Row(weight=weight(MXFP6, MXFP8_INPUT), native=None),
    "MXFP8": Row(weight=weight(MXFP8, MXFP8_INPUT), native="MXFP8", held="=MXFP8/32"),
    "MXFP8A16": Row(weight=weight(MXFP8), native="MXFP8"),
}


def written(holding: Holding) -> str:
    size = f"/{holding.group_size}" if holding.group_size else ""
    return f"{'=' if holding.as_is else '~'}{holding.mode.algo}{size}{'*' if holding.note else ''}"


def held(weight: Weight) -> str:
    return " ".join(written(holding) for holding in holdings(weight))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_family_and_modes_of_every_scheme(row: Row) -> None:
    native = native_mode(row.weight.args)
    assert (str(native) if native else None) == row.native
    assert held(row.weight) == row.held


def test_every_mode_holds_some_scheme_unchanged() -> None:
    """An entry of the table that no scheme uses would be untested."""
    assert {algo for algo in EVERY_ALGO if any(f"={algo}" in row.held for row in ROWS.values())} == EVERY_ALGO


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_a_scheme_that_no_mode_holds_comes_with_reasons(row: Row) -> None:
    reasons = obstacles(row.weight, EVERY_ALGO)
    if not row.held and row.native is not None:
        assert reasons
    assert all(reason.split()[0] in EVERY_ALGO for reason in reasons)
    assert not {reason.split()[0] for reason in reasons} & {holding.mode.algo for holding in holdings(row.weight)}


def test_reasons_are_about_the_given_modes_only() -> None:
    asymmetric = ROWS["int4 g128 asymmetric"].weight
    assert obstacles(asymmetric, frozenset({QuantAlgo.W4A16_AWQ})) == ("W4A16_AWQ holds no zero points",)
    assert obstacles(asymmetric, frozenset({QuantAlgo.FP8, QuantAlgo.W8A16})) == ()


@pytest.mark.parametrize(("bits", "native"), [(3, "W4A16_AWQ"), (4, "W4A16_AWQ"), (8, "W8A16")])
def test_the_recipe_distinguishes_awq_and_gptq_up_to_4_bits_only(bits: int, native: str) -> None:
    assert native_mode(ints(bits, 128), AWQ) == native
    assert native_mode(ints(bits, 128), ("GPTQModifier",)) == native.replace("AWQ", "GPTQ")


@pytest.mark.parametrize(
    ("row", "modelopt", "reference"),
    [
        ("int4 g128", "W4A16_AWQ", "W4A16_AWQ"),
        ("int4 channel", "W4A16", "W4A16"),
        ("int4 g128 asymmetric", None, "W4A16_GPTQ"),
        ("int8 g128", None, None),
        ("W8A8 dynamic", "W8A16", "W8A16"),
        ("fp8 block", "FP8_BLOCK_SCALES", "FP8_BLOCK_SCALES"),
        ("NVFP4", "NVFP4", "NVFP4"),
        ("NVFP4A16", None, "W4A16_NVFP4"),
        ("MXFP8", None, "MXFP8"),
        ("MXFP4A16", None, None),
        ("int4 g256", "W4A16_AWQ", "W4A16_AWQ"),
    ],
)
def test_each_scheme_gets_the_first_mode_that_the_target_has(
    row: str, modelopt: str | None, reference: str | None
) -> None:
    """Symmetric int4 gets W4A16_AWQ whichever tool wrote it; asymmetric int4 needs a target with W4A16_GPTQ."""
    for target, expected in ((MODELOPT, modelopt), (REFERENCE, reference)):
        algos = target.algos(expert=False)
        held_there = holdings(ROWS[row].weight, target.capabilities.platform)
        first = next((h.mode.algo for h in held_there if h.mode.algo in algos), None)
        assert first == expected


def test_the_stored_zero_point_decides_and_not_symmetric() -> None:
    assert holdings(weight(ints(4, 128, symmetric=False)))[0].mode.algo is QuantAlgo.W4A16_AWQ


TILES: list[tuple[Weight, tuple[int, int], bool]] = [
    (weight(ints(4, 64)), (16, 64), True),
    (weight(ints(4, 64)), (8, 64), False),
    (weight(ints(4, 64)), (24, 128), False),
    (weight(ints(4)), (16, 96), False),
    (weight(ints(8)), (16, 64), True),
    (weight(ints(8)), (16, 32), False),
    (weight(ints(8)), (24, 64), False),
    (weight(FP8_TENSOR, FP8_STATIC), (48, 80), True),
    (weight(FP8_TENSOR, FP8_STATIC), (40, 80), False),
    (weight(FP8_TENSOR, FP8_STATIC), (48, 72), False),
    (weight(FP8_CHANNEL, FP8_TOKEN), (24, 80), True),
    (weight(FP8_CHANNEL, FP8_TOKEN), (20, 80), False),
    (weight(FP8_CHANNEL, FP8_TOKEN), (24, 72), False),
    (weight(blocks(), FP8_GROUP), (144, 80), True),
    (weight(blocks(), FP8_GROUP), (136, 80), False),
    (weight(blocks(), FP8_GROUP), (144, 72), False),
    (weight(blocks(), FP8_GROUP, fused=True), (128, 80), True),
    (weight(blocks(), FP8_GROUP, fused=True), (144, 128), False),
    (weight(NVFP4, NVFP4_INPUT), (3, 32), True),
    (weight(NVFP4, NVFP4_INPUT), (3, 48), False),
    (weight(NVFP4), (3, 16), True),
    (weight(NVFP4), (3, 24), False),
    (weight(MXFP4), (32, 32), True),
    (weight(MXFP4), (32, 48), False),
    (weight(MXFP4, expert=True), (128, 128), True),
    (weight(MXFP4, expert=True), (64, 128), False),
    (weight(MXFP4, expert=True), (128, 160), False),
    (weight(MXFP8, MXFP8_INPUT), (96, 32), True),
    (weight(MXFP8, MXFP8_INPUT), (96, 48), False),
    (weight(MXFP8, MXFP8_INPUT), (48, 32), False),
]


@pytest.mark.parametrize(("of", "shape", "fits"), TILES, ids=lambda value: "" if isinstance(value, Weight) else None)
def test_kernels_accept_whole_tiles_only(of: Weight, shape: tuple[int, int], fits: bool) -> None:
    sized = replace(of, shape=shape)
    assert bool(holdings(sized)) is fits
    assert any("% " in reason for reason in obstacles(sized, EVERY_ALGO)) is not fits


def test_fused_linears_begin_at_a_whole_block() -> None:
    """The engine concatenates the scales of q, k and v: a partial block would shift the scales that follow."""
    joined = weight(blocks(), FP8_GROUP, shape=(192, 256), fused=True, fused_parts=("q_proj", "k_proj", "v_proj"))
    assert obstacles(joined, EVERY_ALGO)[-1] == (
        "FP8_BLOCK_SCALES needs out % 128 == 0 in each of q_proj, k_proj and v_proj, which it fuses, and in % 16 == 0"
    )
    assert held(replace(joined, fused=False)) == "=FP8_BLOCK_SCALES"


@pytest.mark.parametrize(("parts", "fits"), [((256, 256), True), ((384, 128), False), ((256, 160), False)])
def test_slices_of_each_stored_part_begin_at_a_whole_block(parts: tuple[int, int], fits: bool) -> None:
    """A weight of several Linears is cut part by part, and the slices of the parts follow each other as if fused."""
    of = weight(blocks(), FP8_GROUP, shape=(sum(parts), 256), slices=Slices(tensor=2, parts=parts))
    assert (held(of) == "=FP8_BLOCK_SCALES") is fits


def test_scales_are_repeated_only_into_whole_groups() -> None:
    """192 columns are three groups of 64 and no whole number of groups of 128."""
    assert held(weight(ints(4), shape=(16, 192))) == "=W4A16 ~W4A16_AWQ/64 ~W4A16_GPTQ/64"


def test_without_a_shape_the_configuration_alone_decides() -> None:
    assert held(weight(ints(4, 64), shape=None)) == "=W4A16_AWQ/64 =W4A16_GPTQ/64"
    assert held(weight(blocks(), FP8_GROUP, shape=None)) == "=FP8_BLOCK_SCALES"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("int4 g32", "W4A16_AWQ holds groups of 64 or 128"),
        ("int8 g128", "W8A16 holds no scale per group"),
        ("int8 channel asymmetric", "W8A16 holds no zero points"),
        ("int4 g128 permuted", "W4A16_AWQ holds contiguous groups only, and this weight has activation ordering"),
        ("fp8 block 64x128", "FP8_BLOCK_SCALES holds blocks of 128x128"),
        (
            "fp8 tensor weight-only",
            "FP8 computes on fp8 static per tensor activations, and the scheme leaves them 16-bit",
        ),
        (
            "NVFP4 with fp8 tokens",
            "NVFP4 computes on fp4 dynamic per group of 16 activations, and the scheme leaves them fp8 token dynamic",
        ),
        (
            "MXFP8A16",
            "MXFP8 computes on fp8 dynamic per group of 32 activations, and the scheme leaves them 16-bit",
        ),
    ],
)
def test_reasons_name_the_obstacle(row: str, words: str) -> None:
    assert words in obstacles(ROWS[row].weight, EVERY_ALGO)


@pytest.mark.parametrize(
    ("row", "note"),
    [
        ("int4 g128", ""),
        ("W8A8 dynamic", "activations stay 16-bit; the scheme asks for int8 token dynamic"),
        ("W8A8 asymmetric activations", "activations stay 16-bit; the scheme asks for int8 tensor asymmetric"),
        ("W4AFP8", "activations stay 16-bit; the scheme asks for fp8 token dynamic"),
        ("fp8 tensor, tokens", ""),
        (
            "fp8 channel, static input",
            "activations are fp8 dynamic per token; the static input scale of the scheme is dropped",
        ),
    ],
)
def test_a_note_says_how_activations_differ_from_the_scheme(row: str, note: str) -> None:
    assert {holding.note for holding in holdings(ROWS[row].weight)} == {note}


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [
        (None, Activations.WIDE),
        (FP8_STATIC, Activations.FP8_STATIC),
        (FP8_TOKEN, Activations.FP8_TOKEN),
        (FP8_GROUP, Activations.FP8_GROUP),
        (MXFP8_INPUT, Activations.MX_FP8),
        (NVFP4_INPUT, Activations.FP4_LOCAL),
        (replace(NVFP4_INPUT, dynamic=True), Activations.FP4_LOCAL),
        (replace(NVFP4_INPUT, dynamic=False, strategy=Strategy.GROUP), Activations.FP4_LOCAL),
        (replace(FP8_STATIC, symmetric=False), Activations.OTHER),
        (replace(FP8_STATIC, dynamic=True), Activations.OTHER),
        (replace(FP8_TOKEN, dynamic=False), Activations.OTHER),
        (MXFP4_INPUT, Activations.OTHER),
        (INT8_TOKEN, Activations.OTHER),
    ],
    ids=lambda value: value.label() if isinstance(value, QuantArgs) else "",
)
def test_the_kind_of_activations_of_a_scheme(inputs: QuantArgs | None, kind: Activations) -> None:
    assert activations_of(QuantScheme(weights=FP8_TENSOR, input_activations=inputs)) is kind


@pytest.mark.parametrize("scheme", [QuantScheme(), QuantScheme(input_activations=FP8_TOKEN)], ids=str)
def test_an_unquantized_weight_raises_an_assertion_error(scheme: QuantScheme) -> None:
    with pytest.raises(AssertionError, match="a quantized weight has arguments"):
        holdings(Weight(scheme=scheme, element=Element.INT, shape=SHAPE))


def test_every_mode_is_listed_once() -> None:
    algos = [mode.algo for mode in LINEAR_MODES]
    assert len(set(algos)) == len(algos)
    assert QuantAlgo.MIXED_PRECISION not in algos


def test_codes_are_described_in_words() -> None:
    words = {mode.algo: mode.codes for mode in LINEAR_MODES}
    assert words[QuantAlgo.W4A16] == "int1-4"
    assert words[QuantAlgo.W8A16] == "int5-8"
    assert words[QuantAlgo.FP8] == words[QuantAlgo.MXFP8] == "fp8"
    assert words[QuantAlgo.NVFP4] == words[QuantAlgo.W4A16_MXFP4] == "fp4"
