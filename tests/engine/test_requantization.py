"""The limits of the forms hold for the worst weights that could be found, and a few come close to them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from trtllm_ct.base.errors import UsageError
from trtllm_ct.engine.calibration import Calibration
from trtllm_ct.engine.holdings import activations_of
from trtllm_ct.engine.linear_mode import Activations
from trtllm_ct.engine.requantization import FORMS, NVFP4_GLOBAL_SCALE, Requantize
from trtllm_ct.layouts.requantize import to_e2m1_exponents, to_e2m1_groups, to_e4m3_blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROUNDED = [name for name, form in FORMS.items() if not form.keeps_codes]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
E4M3 = np.array([m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)])


def held(form: str, values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The weight that a kernel of the form computes with."""
    if form.startswith("fp8"):
        codes, scale = to_e4m3_blocks(values, (128, 128) if form == "fp8-block" else (1, values.shape[1]))
        rows, columns = (128, 128) if form == "fp8-block" else (1, values.shape[1])
        numbers = E4M3[codes & 0x7F] * np.where(codes & 0x80, -1, 1)
        return numbers * scale.repeat(rows, 0).repeat(columns, 1)[: len(values), : values.shape[1]]
    if form.startswith("nvfp4"):
        pairs, scale = to_e2m1_groups(values, 16, NVFP4_GLOBAL_SCALE)
        scales = E4M3[scale] * NVFP4_GLOBAL_SCALE
    else:
        pairs, scale = to_e2m1_exponents(values, 32)
        scales = 2.0 ** (scale.astype(np.float64) - 127)
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(values.shape)
    return E2M1[codes] * scales.repeat(values.shape[1] // scales.shape[1], axis=1)


def relative_error(form: str, values: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(held(form, values) - values) / np.linalg.norm(values))


def hard_values() -> NDArray[np.float32]:
    """Rows whose largest magnitude is apart from all others, which are equal; each pair of both is a row of 128."""
    largest, others = np.meshgrid(np.linspace(0.5, 1, 64), 2.0 ** np.linspace(-7, 0, 96))
    rows = np.repeat(np.minimum(largest, others).reshape(-1, 1), 128, axis=1)
    rows[:, ::16] = largest.reshape(-1, 1)
    return rows.astype(np.float32)


@pytest.mark.parametrize("form", ROUNDED)
def test_no_row_exceeds_the_limit(form: str) -> None:
    rows = hard_values()
    if form == "fp8-block":
        errors = [relative_error(form, np.repeat(row[None], 128, axis=0)) for row in rows[::7]]
    else:
        result = held(form, rows)
        errors = list(np.linalg.norm(result - rows, axis=1) / np.linalg.norm(rows, axis=1))

    assert max(errors) <= FORMS[form].largest_error


@pytest.mark.parametrize("form", ROUNDED)
@pytest.mark.parametrize("seed", range(20))
def test_no_random_weight_exceeds_the_limit(form: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    spread = random.uniform(0.1, 3)
    values = random.choice(E2M1[1:8], (128, 128)) * np.exp(random.normal(-5, spread, (128, 8))).repeat(16, axis=1)

    values = np.minimum(values, 2.0).astype(np.float32)

    assert relative_error(form, values) <= FORMS[form].largest_error


@pytest.mark.parametrize("form", ROUNDED)
def test_the_usual_error_is_that_of_int4_codes_in_groups_of_32(form: str) -> None:
    random = np.random.default_rng(0)
    scale = np.exp(random.normal(-5, 0.3, (256, 32))).repeat(32, axis=1)
    values = (random.integers(-8, 8, scale.shape) * scale).astype(np.float32)

    assert relative_error(form, values) == pytest.approx(FORMS[form].usual_error, rel=0.05)


@pytest.mark.parametrize(
    ("words", "experts", "linears"),
    [
        ("experts=fp8-block", "fp8-block", None),
        (["experts=nvfp4", "linears=fp8"], "nvfp4", "fp8"),
        ("experts=nvfp4, linears=fp8", "nvfp4", "fp8"),
        ("all=fp8-block", "fp8-block", "fp8-block"),
        (["all=fp8", "experts=mxfp4"], "mxfp4", "fp8"),
        ({"experts": "mxfp4"}, "mxfp4", None),
        ({}, None, None),
        (None, None, None),
    ],
)
def test_words_name_forms(words: object, experts: str | None, linears: str | None) -> None:
    asked = Requantize.parse(words)

    assert (asked.form(expert=True), asked.form(expert=False)) == (FORMS.get(experts or ""), FORMS.get(linears or ""))
    assert Requantize.parse(asked.words) == Requantize.from_dict(asked.to_dict()) == asked


@pytest.mark.parametrize("words", ["bogus", "", 5, True, 0, [5], ["experts=fp8", None], {"experts": 5}, {5: "fp8"}])
def test_what_are_no_such_words_is_a_usage_error(words: object) -> None:
    with pytest.raises(UsageError, match="experts=FORM"):
        Requantize.parse(words)


def test_the_json_form_has_the_calibration() -> None:
    calibration = Calibration(scales={"model.layers.0.mlp.experts.0.up_proj": 0.25}, place="scales.safetensors")
    asked = replace(Requantize.parse("experts=w4a8-awq"), calibration=calibration)

    assert Requantize.from_dict(asked.to_dict()) == asked
    assert asked.words == {"experts": "w4a8-awq"}


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_read_static_scales_are_those_whose_inputs_are_so(name: str) -> None:
    form = FORMS[name]

    static = activations_of(form.scheme) in {Activations.FP8_STATIC, Activations.FP4_LOCAL}
    assert static == (form.input_divisor is not None) == Requantize(experts=form).reads_calibration
    assert ("calibration" in form.price) == static
    assert ("keep their codes" in form.price) == form.keeps_codes


def test_words_about_one_kind_beat_those_about_all() -> None:
    for words in ("all=nvfp4,experts=fp8-block", "experts=fp8-block,all=nvfp4"):
        asked = Requantize.parse(words)

        assert (asked.experts, asked.linears) == (FORMS["fp8-block"], FORMS["nvfp4"])


@pytest.mark.parametrize("words", [["experts=fp8-block", "experts=mxfp4"], "all=nvfp4,all=mxfp4"])
def test_two_forms_for_one_kind_are_refused(words: list[str] | str) -> None:
    with pytest.raises(UsageError, match="one form for "):
        Requantize.parse(words)

    assert Requantize.parse(["all=nvfp4", "all=nvfp4"]).experts is FORMS["nvfp4"]
