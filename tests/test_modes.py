from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from trtllm_ct.modes import LINEAR_MODES, Holding, holdings, native_mode, obstacles
from trtllm_ct.schemes import NumberType, QuantAlgo, QuantArgs, QuantScheme, Strategy
from trtllm_ct.targets import MODELOPT, REFERENCE

SHAPE = (256, 512)
AWQ = ("AWQModifier", "QuantizationModifier")


def int_args(bits: int, group_size: int | None = None, strategy: Strategy | None = None) -> QuantArgs:
    return QuantArgs(
        num_bits=bits, strategy=strategy or (Strategy.GROUP if group_size else Strategy.CHANNEL), group_size=group_size
    )


def fp8_args(strategy: Strategy, *, dynamic: bool = False) -> QuantArgs:
    return QuantArgs(num_bits=8, type=NumberType.FLOAT, strategy=strategy, dynamic=dynamic)


FP8_TOKEN = fp8_args(Strategy.TOKEN, dynamic=True)
FP8_STATIC = fp8_args(Strategy.TENSOR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A scheme, its family, and the modes that hold it: `=` as it is, `~` by repeating scales."""

    weights: QuantArgs
    inputs: QuantArgs | None = None
    zero_point: bool = False
    native: str | None
    held: str = ""

    @property
    def scheme(self) -> QuantScheme:
        return QuantScheme(weights=self.weights, input_activations=self.inputs)


ROWS = {
    "int4 g128": Row(
        weights=int_args(4, 128),
        native="W4A16_GPTQ",
        held="=W4A16_AWQ/128 =W4A16_GPTQ/128 ~W4A16_AWQ/64 ~W4A16_GPTQ/64",
    ),
    "int4 g64": Row(weights=int_args(4, 64), native="W4A16_GPTQ", held="=W4A16_AWQ/64 =W4A16_GPTQ/64"),
    "int4 g32": Row(weights=int_args(4, 32), native="W4A16_GPTQ"),
    "int4 g256": Row(weights=int_args(4, 256), native="W4A16_GPTQ"),
    "int4 channel": Row(weights=int_args(4), native="W4A16_GPTQ", held="=W4A16 ~W4A16_AWQ/128 ~W4A16_AWQ/64"),
    "int4 tensor": Row(
        weights=int_args(4, strategy=Strategy.TENSOR),
        native="W4A16_GPTQ",
        held="=W4A16 ~W4A16_AWQ/128 ~W4A16_AWQ/64",
    ),
    "int4 g128 asymmetric": Row(
        weights=int_args(4, 128), zero_point=True, native="W4A16_GPTQ", held="=W4A16_GPTQ/128 ~W4A16_GPTQ/64"
    ),
    "int4 g64 asymmetric": Row(weights=int_args(4, 64), zero_point=True, native="W4A16_GPTQ", held="=W4A16_GPTQ/64"),
    "int4 channel asymmetric": Row(weights=int_args(4), zero_point=True, native="W4A16_GPTQ"),
    "int8 channel": Row(weights=int_args(8), native="W8A16", held="=W8A16"),
    "int8 channel asymmetric": Row(weights=int_args(8), zero_point=True, native="W8A16"),
    "int8 g128": Row(weights=int_args(8, 128), native="W8A16"),
    "fp8 static": Row(weights=FP8_STATIC, inputs=FP8_STATIC, native="FP8", held="=FP8"),
    "fp8 channel, tokens": Row(
        weights=fp8_args(Strategy.CHANNEL), inputs=FP8_TOKEN, native="FP8", held="=FP8_PER_CHANNEL_PER_TOKEN"
    ),
    "fp8 channel, static input": Row(weights=fp8_args(Strategy.CHANNEL), inputs=FP8_STATIC, native="FP8"),
    "fp8 tensor, tokens": Row(weights=FP8_STATIC, inputs=FP8_TOKEN, native="FP8"),
    "fp8 tensor, 16-bit input": Row(weights=FP8_STATIC, native="FP8"),
    "int4 with fp8 tokens": Row(weights=int_args(4, 128), inputs=FP8_TOKEN, native="W4A16_GPTQ"),
    "int8 with int8 tokens": Row(
        weights=int_args(8), inputs=QuantArgs(num_bits=8, strategy=Strategy.TOKEN, dynamic=True), native="W8A16"
    ),
    "int3": Row(weights=int_args(3, 128), native=None),
    "fp4": Row(weights=QuantArgs(num_bits=4, type=NumberType.FLOAT), native=None),
}


def written(holding: Holding) -> str:
    size = f"/{holding.group_size}" if holding.group_size else ""
    return f"{'=' if holding.as_is else '~'}{holding.mode.algo}{size}"


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_family_and_modes_of_every_scheme(row: Row) -> None:
    native = native_mode(row.weights)
    assert (str(native) if native else None) == row.native
    held = holdings(row.scheme, SHAPE, has_zero_point=row.zero_point)
    assert " ".join(written(holding) for holding in held) == row.held


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_a_scheme_that_no_mode_holds_as_it_is_comes_with_reasons(row: Row) -> None:
    reasons = obstacles(row.scheme, SHAPE, has_zero_point=row.zero_point)
    if not row.held and row.native is not None:
        assert reasons
        assert all(reason.split()[0] in QuantAlgo.__members__ for reason in reasons)


@pytest.mark.parametrize(("bits", "native"), [(4, "W4A16_AWQ"), (8, "W8A16")])
def test_the_recipe_tells_awq_from_gptq_for_int4_only(bits: int, native: str) -> None:
    assert native_mode(int_args(bits, 128), AWQ) == native
    assert native_mode(int_args(bits, 128), ("GPTQModifier",)) == native.replace("AWQ", "GPTQ")


@pytest.mark.parametrize(
    ("weights", "zero_point", "modelopt", "reference"),
    [
        (int_args(4, 128), False, "W4A16_AWQ", "W4A16_AWQ"),
        (int_args(4), False, "W4A16", "W4A16"),
        (int_args(4, 64), True, None, "W4A16_GPTQ"),
        (int_args(8, 128), False, None, None),
    ],
    ids=["symmetric", "channel", "asymmetric", "int8 group"],
)
def test_the_first_mode_that_a_target_declares(
    weights: QuantArgs, zero_point: bool, modelopt: str | None, reference: str | None
) -> None:
    """Symmetric int4 is W4A16_AWQ whatever made it; asymmetric int4 has a mode only where GPTQ is declared."""
    held = holdings(QuantScheme(weights=weights), SHAPE, has_zero_point=zero_point)
    for target, expected in ((MODELOPT, modelopt), (REFERENCE, reference)):
        first = next((holding.mode.algo for holding in held if holding.mode.algo in target.algos), None)
        assert first == expected


def test_the_stored_zero_point_decides_and_not_the_word_symmetric() -> None:
    scheme = QuantScheme(weights=replace(int_args(4, 128), symmetric=False))
    assert holdings(scheme, SHAPE, has_zero_point=False)[0].mode.algo is QuantAlgo.W4A16_AWQ


@pytest.mark.parametrize(
    ("weights", "shape", "fits"),
    [
        (int_args(4, 64), (16, 64), True),
        (int_args(4, 64), (8, 64), False),
        (int_args(4, 64), (24, 128), False),
        (int_args(4), (16, 96), False),
        (int_args(8), (16, 64), True),
        (int_args(8), (16, 32), False),
    ],
)
def test_kernels_take_whole_tiles_only(weights: QuantArgs, shape: tuple[int, int], fits: bool) -> None:
    scheme = QuantScheme(weights=weights)
    assert bool(holdings(scheme, shape, has_zero_point=False)) is fits
    assert any("% " in reason for reason in obstacles(scheme, shape, has_zero_point=False)) is not fits


def test_scales_are_repeated_only_into_whole_groups() -> None:
    """192 columns are three groups of 64 and no whole number of groups of 128."""
    held = holdings(QuantScheme(weights=int_args(4)), (16, 192), has_zero_point=False)
    assert [written(holding) for holding in held] == ["=W4A16", "~W4A16_AWQ/64"]


def test_without_a_shape_the_configuration_alone_is_asked() -> None:
    held = holdings(QuantScheme(weights=int_args(4, 64)), None, has_zero_point=False)
    assert [written(holding) for holding in held] == ["=W4A16_AWQ/64", "=W4A16_GPTQ/64"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("int4 g32", "W4A16_AWQ holds groups of 64 or 128"),
        ("int8 g128", "W8A16 holds no scale per group"),
        ("int8 channel asymmetric", "W8A16 holds no zero points"),
        ("int4 with fp8 tokens", "W4A16_AWQ computes on 16-bit activations"),
        ("fp8 tensor, tokens", "FP8 computes on fp8 static per tensor activations"),
    ],
)
def test_reasons_are_words(row: str, words: str) -> None:
    assert words in obstacles(ROWS[row].scheme, SHAPE, has_zero_point=ROWS[row].zero_point)


@pytest.mark.parametrize("scheme", [QuantScheme(), QuantScheme(input_activations=FP8_TOKEN)], ids=str)
def test_unquantized_weights_have_no_mode(scheme: QuantScheme) -> None:
    assert holdings(scheme, SHAPE, has_zero_point=False) == ()
    assert obstacles(scheme, SHAPE, has_zero_point=False) == ()


def test_every_mode_is_listed_once() -> None:
    algos = [mode.algo for mode in LINEAR_MODES]
    assert len(set(algos)) == len(algos)
    assert QuantAlgo.MIXED_PRECISION not in algos
