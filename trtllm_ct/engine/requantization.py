"""Requantization on request: modes that a weight is rounded to where it would be dequantized, and their price.

It never happens unless a user asks for it. A `Form` says what the rounded weight is, as a scheme: planning then treats
it like a weight that was stored so, and the table of modes says which kernel holds it. The limits are those of the
searches in `layouts/requantize.py`, which round each value to the nearest code.
Some kernels compute on inputs with a static scale, which checkpoints with 16-bit activations lack. It is then given
beside the checkpoint, as a `Calibration`; one of these forms keeps the codes of the weight as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.base.json_form import fields_form
from trtllm_ct.base.schemes import Element, NumberType, QuantArgs, QuantScheme, Strategy
from trtllm_ct.engine.calibration import NOT_CALIBRATED, Calibration

__all__ = ["FORMS", "NOT_REQUANTIZED", "NVFP4_GLOBAL_SCALE", "Form", "Requantize"]

NVFP4_GLOBAL_SCALE = 2.0**-8
"""The global scale of weights that are rounded to NVFP4.

A power of two changes no mantissa, and one for all weights is equal in all parts of a fused Linear and of an expert, as
engines require. It holds magnitudes up to 10.5; group scales have full precision for groups whose largest one is above
4 x 10^-4.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a weight becomes when it is requantized.

    `scheme` is its scheme then, with the activations that its kernels compute on; `element` are its codes and
    `scale_dtype` is the dtype of its scales.
    `largest_error` is the relative error that no weight can exceed (of NVFP4, none whose largest magnitude is above
    4 x 10^-4): the root of the sum of squared errors over that of squared values. `usual_error` is that of int4 codes
    in groups of 32, as docs/requantization.md measures it. With `powers_of_two` float32 scales are powers of two. With
    `keeps_codes` the weight itself is not changed: it has the arguments that it is stored with, whatever those of
    `scheme` say.
    `input_divisor` says that kernels read a static scale of the input: that of the calibration, which is the largest
    magnitude over 448, divided by this number. None if kernels compute it, or leave the input in 16 bits.
    """

    name: str
    scheme: QuantScheme
    element: Element
    scale_dtype: DType
    largest_error: float
    usual_error: float
    powers_of_two: bool = False
    keeps_codes: bool = False
    input_divisor: float | None = None

    @property
    def weights(self) -> QuantArgs:
        """The quantization arguments of the requantized weight."""
        if self.scheme.weights is None:
            raise AssertionError("a form quantizes weights")
        return self.scheme.weights

    @property
    def row_unit(self) -> int:
        """The number of rows that share scales."""
        return self.weights.block_structure[0] if self.weights.block_structure else 1

    @property
    def price(self) -> str:
        """What the form costs a weight, in words."""
        if self.keeps_codes:
            return "weights keep their codes, and inputs get static scales from a calibration"
        price = f"weights are rounded to {self.name}, with a relative error of at most {self.largest_error:.0%}"
        return price if self.input_divisor is None else f"{price}; scales of inputs are from a calibration"


_BLOCK_128 = QuantArgs(num_bits=8, type=NumberType.FLOAT, strategy=Strategy.BLOCK, block_structure=(128, 128))
_GROUP_128 = QuantArgs(num_bits=8, type=NumberType.FLOAT, strategy=Strategy.GROUP, group_size=128, dynamic=True)
_ROW = QuantArgs(num_bits=8, type=NumberType.FLOAT, strategy=Strategy.CHANNEL)
_TOKEN = QuantArgs(num_bits=8, type=NumberType.FLOAT, strategy=Strategy.TOKEN, dynamic=True)
_GROUP_16 = QuantArgs(
    num_bits=4, type=NumberType.FLOAT, strategy=Strategy.TENSOR_GROUP, group_size=16, scale_dtype="float8_e4m3fn"
)
_GROUP_32 = QuantArgs(num_bits=4, type=NumberType.FLOAT, strategy=Strategy.GROUP, group_size=32, scale_dtype="uint8")
_INT4_GROUP_128 = QuantArgs(num_bits=4, type=NumberType.INT, strategy=Strategy.GROUP, group_size=128)
_STATIC = QuantArgs(num_bits=8, type=NumberType.FLOAT, strategy=Strategy.TENSOR, dynamic=False)
_LOCAL_16 = QuantArgs(num_bits=4, type=NumberType.FLOAT, strategy=Strategy.TENSOR_GROUP, group_size=16, dynamic="local")


_NVFP4 = Form(
    name="nvfp4",
    scheme=QuantScheme(weights=_GROUP_16),
    element=Element.E2M1,
    scale_dtype=DType.F8_E4M3,
    largest_error=0.25,
    usual_error=0.075,
)

# E4M3 has four significant bits: half a step is at most 1/17 of a value, and below the smallest normal number it is
# 2^-10 of a scale that is at most 1/224 of the largest magnitude. For E2M1 the worst group is one whose largest
# magnitude makes the scale unfit for all others; the limits leave room above the worst group that
# `tests/engine/test_requantization.py` finds.
FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        Form(
            name="fp8-block",
            scheme=QuantScheme(weights=_BLOCK_128, input_activations=_GROUP_128),
            element=Element.E4M3,
            scale_dtype=DType.F32,
            largest_error=0.06,
            usual_error=0.026,
        ),
        _NVFP4,
        Form(
            name="mxfp4",
            scheme=QuantScheme(weights=_GROUP_32),
            element=Element.E2M1,
            scale_dtype=DType.U8,
            largest_error=0.45,
            usual_error=0.105,
        ),
        Form(
            name="fp8",
            scheme=QuantScheme(weights=_ROW, input_activations=_TOKEN),
            element=Element.E4M3,
            scale_dtype=DType.F32,
            largest_error=0.06,
            usual_error=0.0235,
        ),
        Form(
            name="w4a8-awq",
            scheme=QuantScheme(weights=_INT4_GROUP_128, input_activations=_STATIC),
            element=Element.INT,
            scale_dtype=DType.F32,
            largest_error=0,
            usual_error=0,
            keeps_codes=True,
            input_divisor=1,
        ),
        # The static scale of an NVFP4 input is its largest magnitude over 6 * 448, the largest number of both levels.
        replace(
            _NVFP4,
            name="nvfp4-w4a4",
            scheme=QuantScheme(weights=_GROUP_16, input_activations=_LOCAL_16),
            input_divisor=6,
        ),
    )
}
"""What users may ask for, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requantize:
    """What a user asked for: the form of routed experts and of all other Linears; None leaves them dequantized.

    `calibration` has the static scales of inputs, for the forms whose kernels read them.
    """

    experts: Form | None = None
    linears: Form | None = None
    calibration: Calibration = NOT_CALIBRATED

    @classmethod
    def parse(cls, texts: str | Iterable[str] | Mapping[str, str] | Requantize | None) -> Requantize:
        """Return what texts such as `experts=fp8-block` ask for; a mapping of the same words is accepted too.

        Several may stand in one text, with commas between them. What was parsed before is returned as it is. Raises
        `UsageError` for other words, and for what are no words.
        """
        if texts is None or isinstance(texts, Requantize):
            return texts or NOT_REQUANTIZED
        if isinstance(texts, Mapping):
            texts = [f"{what}={form}" for what, form in texts.items()]
        words = [texts] if isinstance(texts, str) else list(texts) if isinstance(texts, Iterable) else [texts]
        forms: dict[str, Form] = {}
        for word in words:
            if not isinstance(word, str):
                raise _other_words(word)
        for text in (part.strip() for word in words for part in word.split(",")):
            what, _, name = text.partition("=")
            if what not in {"experts", "linears", "all"} or name not in FORMS:
                raise _other_words(text)
            if forms.setdefault(what, FORMS[name]) is not FORMS[name]:
                raise _two_forms(what, forms[what].name, name)
        both = forms.get("all")
        return cls(experts=forms.get("experts", both), linears=forms.get("linears", both))

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Requantize:
        """Create the value from the output of `to_dict`."""
        calibration = entry.get("calibration")
        words = {what: form for what, form in entry.items() if what != "calibration"}
        return replace(cls.parse(words), calibration=Calibration(**calibration) if calibration else NOT_CALIBRATED)

    @property
    def reads_calibration(self) -> bool:
        """Whether something was asked for whose kernels read static scales of inputs."""
        return any(form is not None and form.input_divisor is not None for form in (self.experts, self.linears))

    def form(self, *, expert: bool) -> Form | None:
        """Return the form of a module; None if it was not asked for."""
        return self.experts if expert else self.linears

    @property
    def words(self) -> dict[str, str]:
        """The names of the forms that were asked for: what `parse` takes."""
        return {what: form.name for what, form in (("experts", self.experts), ("linears", self.linears)) if form}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: the words, and the calibration if there is one."""
        return self.words | ({"calibration": fields_form(self.calibration)} if self.calibration.scales else {})


def _other_words(found: object) -> UsageError:
    expected = f"experts=FORM, linears=FORM or all=FORM, where FORM is {' or '.join(FORMS)}"
    remedy = "Name one of these, such as --requantize experts=fp8-block."
    return UsageError(Fault(where="--requantize", expected=expected, found=repr(found), remedy=remedy))


def _two_forms(what: str, first: str, second: str) -> UsageError:
    remedy = "Ask for one of them."
    found = f"{first} and {second}"
    return UsageError(Fault(where="--requantize", expected=f"one form for {what}", found=found, remedy=remedy))


NOT_REQUANTIZED = Requantize()
